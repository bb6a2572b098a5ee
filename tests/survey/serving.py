"""Runs prompts through the server's engine: alone, in one batch, and over cached prefixes."""

from __future__ import annotations

import random

from server.engine.core import EngineCore
from server.messages import Submit
from server.settings import Settings
from tests.engine.harness import GREEDY, Outcome, collect

MAX_TOKENS = 12
_LENGTHS = (1, 5, 17, 40)
_LONGEST = 100
# Tokens of prompts: none that a config gives a meaning of its own.
_TOKENS = range(8, 150)


def settings(max_context: int | None = None) -> Settings:
    """Of the server that is tried: exact, with pages and steps so small that every text spans several."""
    return Settings(
        device="cpu",
        weights="float",
        dtype="float32",
        page_size=8,
        max_running=8,
        max_batch_tokens=24,
        max_context=max_context,
        kv_memory=64 << 20,
        threads=1,
        check_integrity=True,
    )


def prompts_beyond(threshold: int) -> list[list[int]]:
    """Random texts of several lengths, the longest well beyond ``threshold``."""
    rng = random.Random(0)
    longest = max(_LONGEST, 2 * threshold + 20)
    return [[rng.choice(_TOKENS) for _ in range(length)] for length in (*_LENGTHS, longest)]


def serve(core: EngineCore, prompts: list[list[int]], top: int) -> dict[str, list[Outcome]]:
    """Every prompt alone, then all at once in chunks, then once more over the pages that are left."""
    rounds = {"alone": [_run(core, [prompt], 10 * i, top)[0] for i, prompt in enumerate(prompts, 1)]}
    rounds["in a mixed batch"] = _run(core, prompts, 1000, top)
    rounds["after prefix hits"] = _run(core, prompts, 2000, top, echo=False)
    return rounds


def _run(
    core: EngineCore, prompts: list[list[int]], first: int, top: int, *, echo: bool = True
) -> list[Outcome]:
    outcomes = {first + i: Outcome() for i in range(len(prompts))}
    for (identity, _), prompt in zip(outcomes.items(), prompts, strict=True):
        core.submit(
            Submit(
                id=identity,
                prompt=prompt,
                sampling=GREEDY,
                max_tokens=MAX_TOKENS,
                logprobs=top,
                prompt_logprobs=top if echo else None,
            )
        )
    while core.has_work:
        collect(core, outcomes)
    return list(outcomes.values())
