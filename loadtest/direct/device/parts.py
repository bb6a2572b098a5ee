"""The parts of the benchmark, each of which tells figures and facts as it finds them.

They run in a process of their own, see ``work``. A figure is a number in plain units (seconds, bytes, tokens
per second); a fact is a text.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from loadtest.direct.device import machine, peer
from loadtest.direct.device.forms import Form, Load
from loadtest.direct.device.model import build
from loadtest.direct.engine import DirectEngine, open_engine
from loadtest.load.measure import measure
from loadtest.load.plan import Plan
from loadtest.load.result import Run
from loadtest.load.types import ClosedLoop, Session
from loadtest.load.workloads import Shape, fixed
from loadtest.servers import serve
from server.cli.options import flag
from server.cli.options import load as load_settings
from server.engine.hardware import measure_device

Found = Iterator[tuple[str, float | str]]

_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PREFILLS = 3
_WARMUP_SEED = 5


def _machine(form: Form, folder: Path) -> Found:
    """The limits: memory's bandwidth, and the matrix rate in the format that the model computes in."""
    torch.set_num_threads(load_settings({}).threads or len(os.sched_getaffinity(0)))
    device = machine.device_at_hand()
    if form.cuda and device.type != "cuda":
        raise RuntimeError(
            "torch sees no CUDA device, and the whole form needs one; "
            "--small measures a tiny model on the CPU instead"
        )
    yield "device", machine.device_name(device)
    yield "versions", _versions()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found = measure_device(device, dtype, form.buffer, form.repeats)
    yield "bandwidth", found.bandwidth
    yield "matrix_rate", found.matrix_rate


def _model(form: Form, folder: Path) -> Found:
    """The model on disk."""
    device = machine.device_at_hand()
    yield "model", "written" if build(form.shape, folder, device) else "found"
    _give_back(device)


def _direct(form: Form, folder: Path) -> Found:
    """The engine without a server: a decode step, a prefill, one stream and many."""
    with closing(open_engine(load_settings(form.settings(str(folder))), folder)) as engine:
        ready = engine.ready
        if ready.parameters != form.shape.parameters:
            raise RuntimeError(
                f"the model has {ready.parameters} weights, and its shape {form.shape.parameters}: the bytes "
                "and sums counted here are not its own"
            )
        yield "attention", f"{ready.attention_backend}, kernel {ready.attention_kernel}"
        captured = f"decode steps of {ready.cuda_graphs} batch sizes captured"
        yield "numbers", f"weights {ready.weights}, computing in {ready.dtype}, {captured}"

        times = engine.decode(form.decode_context, 1, form.decode_steps).seconds
        middle = form.decode_context + (form.decode_steps + 1) / 2
        yield "decode_seconds", statistics.median(times)
        yield (
            "decode_bytes",
            form.shape.decode_bytes(middle, 1, _WEIGHT_BYTES[ready.weights], _kv_token_bytes(engine)),
        )
        yield "prefill_seconds", statistics.median(engine.prefill_times(0, form.prefill_tokens, _PREFILLS))
        yield "prefill_flops", form.shape.prefill_flops(0, form.prefill_tokens)

        engine.generate(_prompts(form, form.batch, _WARMUP_SEED), form.batch[2])
        run = engine.generate(_prompts(form, form.batch), form.batch[2])
        yield "batch_rate", run.output_tokens / run.seconds
        runs = [engine.generate([prompt], form.single[2]) for prompt in _prompts(form, form.single)]
        yield "single_rate", sum(run.output_tokens for run in runs) / sum(run.seconds for run in runs)
        yield "direct_memory", machine.memory_in_use(engine.core.runner.device)


def _served(form: Form, folder: Path) -> Found:
    """The same loads through a server process and gRPC."""
    with serve(*_flags(form.settings(str(folder)))) as address:

        def run(load: Load, users: int, warmup: int) -> Run:
            requests, prompt_tokens, output_tokens = load
            plan = Plan(
                host=address.host,
                port=address.port,
                metrics_url=address.metrics_url,
                workload={"name": "fixed", "prompt_tokens": prompt_tokens, "output_tokens": output_tokens},
                draw=lambda count, seed: _sessions(form, (count, prompt_tokens, output_tokens), seed),
                loads=[ClosedLoop(users)],
                sessions=requests,
                warmup=warmup,
                workers=max(1, min(users, len(os.sched_getaffinity(0)) // 4)),
            )
            (run,) = measure(plan, Console(stderr=True)).runs
            if run.summary.failed:
                raise RuntimeError(
                    f"{sum(run.summary.failed.values())} requests failed: {run.summary.failed}"
                )
            return run

        streams = form.batch[0]
        for name, load, users, warmup in (
            ("batch", form.batch, streams, streams),
            ("single", form.single, 1, 0),
        ):
            outcome = run(load, users, warmup)
            yield f"served_{name}_rate", outcome.summary.output_rate
            yield f"served_{name}_note", "; ".join([*outcome.objections, *outcome.disagreements])
        yield "served_memory", machine.memory_in_use(machine.device_at_hand())


def _long(pattern: str) -> Callable[[Form, Path], Found]:
    """Decode steps of one stream at a short and at a long context under a pattern."""

    def part(form: Form, folder: Path) -> Found:
        settings = load_settings(form.long_settings(str(folder), pattern))
        with closing(open_engine(settings, folder)) as engine:
            yield f"{pattern}_attention", f"{engine.ready.attention_pattern}, {engine.ready.attention_kernel}"
            for name, context in zip(("short", "long"), form.contexts, strict=True):
                times = engine.decode(context, 1, form.context_steps).seconds
                yield f"{pattern}_{name}_seconds", statistics.median(times)
            yield f"{pattern}_memory", machine.memory_in_use(engine.core.runner.device)

    return part


def _transformers(form: Form, folder: Path) -> Found:
    """The peer under the load of many streams."""
    device = machine.device_at_hand()
    torch.set_num_threads(load_settings({}).threads or len(os.sched_getaffinity(0)))
    warmup, prompts = _prompts(form, form.batch, _WARMUP_SEED), _prompts(form, form.batch)
    found = peer.continuous_batching(str(folder), device, warmup, prompts, form.batch[2])
    yield from zip(("transformers_rate", "transformers_attention", "transformers_memory"), found, strict=True)


PARTS: dict[str, Callable[[Form, Path], Found]] = {
    "machine": _machine,
    "model": _model,
    "direct": _direct,
    "served": _served,
    "window": _long("window"),
    "top-k": _long("top-k"),
    "transformers": _transformers,
}


def _kv_token_bytes(engine: DirectEngine) -> float:
    """Bytes of one token's keys and values, as the engine really keeps them."""
    ready = engine.ready
    return ready.kv_bytes / ((ready.pages_total + 1) * ready.page_size)


def _sessions(form: Form, load: Load, seed: int) -> list[Session]:
    count, prompt_tokens, output_tokens = load
    shape = form.shape
    return fixed(Shape(count, prompt_tokens, output_tokens, shape.vocabulary, shape.positions, seed))


def _prompts(form: Form, load: Load, seed: int = 0) -> list[list[int]]:
    """The prompts that the served load draws from the same seed."""
    return [cast("list[int]", session.turns[0].prompt) for session in _sessions(form, load, seed)]


def _flags(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of ``longspan serve``."""
    flags = []
    for name, value in settings.items():
        if value is False:
            flags.append(flag(f"no_{name}"))
        elif isinstance(value, dict):
            flags += [word for key, text in value.items() for word in (flag(name), f"{key}={text}")]
        else:
            flags += [flag(name), str(value)]
    return flags


def _versions() -> str:
    names = ("longspan", "torch", "transformers", "triton")
    found = {name: _version(name) for name in names}
    found["CUDA"] = torch.version.cuda
    known = [f"{name} {number}" for name, number in found.items() if number]
    return ", ".join([f"Python {platform.python_version()}", *known])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _give_back(device: torch.device) -> None:
    """Frees the memory for later processes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
