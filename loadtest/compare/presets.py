"""Presets: named sets of candidates, contexts, tasks and budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loadtest.deployment import FULL, Deployment, oracle, sparse, topk, window
from loadtest.tasks.registry import TASKS


@dataclass(frozen=True, slots=True)
class Preset:
    """A comparison under a name.

    Attributes:
        name: what to type.
        candidates: the first is full attention.
        contexts: lengths in tokens, ascending.
        tasks: names of ``loadtest.tasks``.
        seconds: budget.
        chat: questions are asked through the chat template; ``None``: where the model has one.
        prefill: one user's load has cells with new prompts too, not only with prompts in the prefix cache.
        fixed: candidates, contexts, tasks and load can't be changed: known figures exist only for them.
        units: contexts of each task and length, and slices of text, that every candidate gets at least.
    """

    name: str
    candidates: tuple[Deployment, ...]
    contexts: tuple[int, ...]
    tasks: tuple[str, ...]
    seconds: float
    chat: bool | None = None
    prefill: bool = True
    fixed: bool = False
    units: int = 1


QUICK = Preset(
    "quick",
    (FULL, window(1020, 4), topk(512)),
    (1024, 4096),
    ("needles",),
    300.0,
)

WHOLE = Preset(
    "full",
    (
        FULL,
        window(508, 4),
        window(1020, 4),
        window(2044, 4),
        topk(256),
        topk(512),
        topk(1024),
        oracle(512),
        sparse("longformer", "longformer"),
        sparse("segment 512", "segment"),
        sparse("bigbird", "bigbird"),
        sparse("lsh", "lsh"),
    ),
    (1024, 2048, 4096, 8192),
    tuple(TASKS),
    2 * 3600.0,
)
"""The middle one of top-k's three budgets has its oracle, which separates the loss of the budget from that of
the selection. An oracle reads every key, so it is slow, and each further one would take time from all; one of
another budget can be given as a ``--candidate``."""

SINKS = window(508, 4)
BARE = replace(window(508, 0), name="window 508, no sinks")
IN_CACHE = Deployment(
    "window 1020 + 4, in-cache", "sliding_window", {"window": "1020", "sinks": "4", "positions": "cache"}
)
SELECTION = topk(512)

KNOWN = Preset(
    "known",
    (FULL, SINKS, BARE, SELECTION, IN_CACHE),
    (1024, 4096),
    ("passkey", "needles"),
    1200.0,
    # Asked by chat, the default model answers much less of what it can find.
    chat=False,
    prefill=False,
    fixed=True,
    # A perplexity is claimed of two slices or more, also of a variant whose loss in tasks is certain at once.
    units=2,
)

PRESETS = {preset.name: preset for preset in (QUICK, WHOLE, KNOWN)}
"""All of them, by name."""
