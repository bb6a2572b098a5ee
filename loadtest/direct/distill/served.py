"""The pair as it is served: acceptance and speed by real servers, with the student and without it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loadtest.direct.distill.student import make_student
from loadtest.direct.distill.types import Listener, Row, Served
from loadtest.greedy import GREEDY
from loadtest.measuring.statistics import median_interval
from loadtest.servers import serve
from longspan import Client

PROMPTS = 12
OUTPUT_TOKENS = 64
_KV_MEMORY = "256MiB"

ALONE, BEFORE, AFTER = "without a draft model", "student before training", "student"


def measure(
    model: str, teacher: Path, student: Path, held_out: torch.Tensor, cache_dir: Path, listener: Listener
) -> Served:
    """Serves the teacher alone, with the student as it was cut, and with the trained student, and asks each.

    All have the same prompts in turn, there and back, one request at a time, so that what else happens on the
    machine strikes all. The first prompt is asked once more before, which warms the servers up.

    Args:
        model: as ``longspan serve --model``; empty for the default model.
        teacher: its folder.
        student: its folder, trained.
        held_out: token ids ``[blocks, context]``; the first half of a block is a prompt.
        cache_dir: where converted models are kept.
        listener: told of progress.

    Raises:
        loadtest.servers.NotStartedError: a server refuses the pair; says why.
        longspan.LongspanError: a server failed.
    """
    prompts = [block[: held_out.shape[1] // 2].tolist() for block in _spread(held_out)]
    with _untrained(teacher, student) as untrained, ExitStack() as stack:
        drafts = {ALONE: None, BEFORE: untrained, AFTER: student}
        clients = {}
        for number, (name, draft) in enumerate(drafts.items()):
            listener("starting servers", number, len(drafts))
            more = () if draft is None else ("--speculate", "draft", "--draft-model", str(draft))
            chosen = ("--model", model) if model else ()
            sizes = ("--cache-dir", str(cache_dir), "--kv-memory", _KV_MEMORY)
            address = stack.enter_context(serve(*chosen, *sizes, *more))
            clients[name] = stack.enter_context(Client(address.host, address.port))
        return _asked(clients, prompts, listener)


def _asked(clients: Mapping[str, Client], prompts: Sequence[list[int]], listener: Listener) -> Served:
    names = list(clients)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    drafted, accepted, tokens = (dict.fromkeys(names, 0) for _ in range(3))
    differ = 0
    for number, prompt in enumerate([prompts[0], *prompts]):
        answers = []
        for name in names if number % 2 else reversed(names):
            began = time.monotonic()
            found = clients[name].generate(prompt, max_tokens=OUTPUT_TOKENS, ignore_eos=True, **GREEDY)
            if number:
                seconds[name].append(time.monotonic() - began)
                drafted[name] += found.usage.draft_tokens
                accepted[name] += found.usage.accepted_draft_tokens
                tokens[name] += found.usage.completion_tokens
            answers.append(found.token_ids)
        differ += number > 0 and any(answer != answers[0] for answer in answers)
        listener("asking the served pair", number, len(prompts))
    return Served(
        prompts=len(prompts),
        prompt_tokens=len(prompts[0]),
        output_tokens=OUTPUT_TOKENS,
        rows=tuple(
            Row(
                name,
                tokens[name] / sum(seconds[name]),
                drafted[name],
                accepted[name],
                tokens[name] / (tokens[name] - accepted[name]),
                median_interval(
                    [alone / own for alone, own in zip(seconds[ALONE], seconds[name], strict=True)]
                ),
            )
            for name in names
        ),
        different=differ,
    )


def _spread(held_out: torch.Tensor) -> list[torch.Tensor]:
    """Blocks from all over the held-out text."""
    count = min(PROMPTS, len(held_out))
    return [held_out[number * len(held_out) // count] for number in range(count)]


@contextmanager
def _untrained(teacher: Path, student: Path) -> Iterator[Path]:
    """A folder with the student as it was cut from the teacher, while the block runs."""
    with TemporaryDirectory(prefix="longspan-student-") as name:
        folder = Path(name)
        whole: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        layers = AutoModelForCausalLM.from_pretrained(student).config.num_hidden_layers
        make_student(whole, layers).save_pretrained(folder)  # type: ignore[operator]
        for file in student.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        yield folder
