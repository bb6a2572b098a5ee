"""For a machine with a GPU: the engine gives the tokens there that it gives on the CPU.

    python -m tests.engine.gpu_check

With captured decode steps, the step ahead, the selection of ``topk`` and weights in 8 bits. Most
of these the engine tries at its start and leaves out, or refuses, where they fail; a refusal, or no captured
step, is a failure here. Ends with 1 if anything failed.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from server.engine.build import build_engine
from server.errors import RefusedError
from server.messages import Sampling, Submit
from server.settings import Settings
from tests.engine.harness import GREEDY, run
from tests.models_zoo import save_tiny

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"attention": "sliding_window", "attention_option": {"window": "40", "sinks": "4"}},
    "rerotated": {"attention": "sliding_window", "attention_option": {"window": "40", "positions": "cache"}},
    "topk": {"attention": "sparse", "attention_option": {"pattern": "topk", "budget": "64"}},
    "float8 cache": {"kv_dtype": "float8_e4m3"},
    "int8": {"weights": "int8"},
    "fp8": {"weights": "fp8"},
}
# Rounding keys or weights to 8 bits can turn the last bit of a sum into another token: these are held to
# themselves, without captured steps.
OWN = ("float8 cache", "int8", "fp8")
KINDS = ("llama", "qwen3")


def requests() -> list[Submit]:
    """Short and long prompts, greedy and drawn."""
    lengths = (5, 70, 33, 150, 16)
    prompts = [[(7 * j * j + 11 * n) % 300 + 4 for j in range(length)] for n, length in enumerate(lengths)]
    return [
        Submit(
            id=n,
            prompt=prompt,
            sampling=Sampling(seed=n, temperature=0.8, top_p=0.9) if n == 4 else GREEDY,
            max_tokens=12 + 3 * n,
        )
        for n, prompt in enumerate(prompts, 1)
    ]


def tokens(folder: Path, case: dict[str, Any], **settings: Any) -> tuple[list[list[int]], int]:
    """The output of every request, and how many batch sizes were captured."""
    chosen = {"max_running": 8, "kv_memory": 1 << 26, "check_integrity": True, **case, **settings}
    core, ready = build_engine(Settings(dtype="float32", **chosen), folder, lambda stage, fraction: None)
    outcomes = run(core, requests())
    return [outcomes[request.id].tokens for request in requests()], ready.cuda_graphs


def check(folder: Path, name: str, device: str, kernel: str) -> str:
    """The fault of a case; empty if there is none."""
    case = CASES[name]
    place = {"device": device, "kernel": kernel}
    try:
        found, captured = tokens(folder, case, **place)
        plain = case if name in OWN else {**case, "weights": "float"}
        where = place if name in OWN else {"device": "cpu", "kernel": "reference"}
        expected, _ = tokens(folder, plain, **where, cuda_graphs=False)
    except RefusedError as error:
        return str(error)
    if device == "cuda" and not captured:
        return "no decode step was captured; the log says why"
    same = [own == right for own, right in zip(found, expected, strict=True)]
    return "" if all(same) else f"{same.count(False)} of {len(same)} sequences got other tokens"


def main(device: str = "cuda", kernel: str = "triton", kinds: tuple[str, ...] = KINDS) -> int:
    """Runs every case that the device has."""
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device")
        return 1
    logging.basicConfig(level=logging.WARNING)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            model = save_tiny(kind, Path(folder) / kind)
            for name in CASES:
                if device == "cpu" and name == "fp8":
                    continue
                wrong = check(model, name, device, kernel)
                failed += bool(wrong)
                print(f"{kind}, {name}: {wrong or 'ok'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
