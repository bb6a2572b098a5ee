"""Known figures of the default model, SmolLM2-135M-Instruct, when compared by ``presets.KNOWN``.

Bounds are for the prose of Python's manual and leave room for other processors, where 8-bit activations round
otherwise. On another model or text a figure beyond its bound is a finding, not a fault.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from loadtest.compare.presets import BARE, IN_CACHE, SELECTION, SINKS
from loadtest.deployment import FULL

SINGLE = "passkey"
"""One number, said twice among sentences that repeat, which the default model finds."""

MANY = "needles"
"""Many numbers in prose, of which the default model finds most: what a variant sees, by depth."""


class Figure(enum.StrEnum):
    """The figure that a bound is set for."""

    PERPLEXITY = "perplexity of the text, times full's"
    FOUND = "share of a task's questions that are answered"
    LOGPROB = "log probability of the answers of ``MANY`` that is lost against full, nats per token"
    MEMORY = "KV cache, times that at a shorter context"
    TPOT = "time per output token, times that at a shorter context"


@dataclass(frozen=True, slots=True)
class Expectation:
    """A figure and its bounds.

    Attributes:
        deployment: name of the candidate.
        figure: of it.
        length: context, tokens.
        reason: why it is so, and where it is known from.
        least: lower bound, inclusive.
        most: upper bound, inclusive.
        shorter: the context that a growth is counted from.
        depths: of the needles that count, as shares of the text, both ends inclusive.
        task: that is asked, for ``FOUND``.
    """

    deployment: str
    figure: Figure
    length: int
    reason: str
    least: float = -math.inf
    most: float = math.inf
    shorter: int = 0
    depths: tuple[float, float] = (0.0, 1.0)
    task: str = SINGLE


_TASK = "a number said twice is within the model's reach"
_SINKS = "attention puts its excess weight on the first tokens (sinks); Xiao et al. 2023, section 3"
_INSIDE = "the window holds them"
_OUTSIDE = "the window has evicted them"
_SELECTION = "the pages that a query needs are selected; Tang et al. 2024, section 3"
_COVERED = "the window holds the whole context"
_FREED = "pages outside the window are freed"
_KEPT = "all pages are kept"
_READ = "a decoded token reads all that it sees"

EXPECTED: tuple[Expectation, ...] = (
    Expectation(SINKS.name, Figure.PERPLEXITY, 4096, _SINKS, 0.99, 1.15),
    Expectation(BARE.name, Figure.PERPLEXITY, 1024, _SINKS, 1.4),
    Expectation(BARE.name, Figure.PERPLEXITY, 4096, _SINKS, 1.4),
    Expectation(SELECTION.name, Figure.PERPLEXITY, 4096, _SELECTION, 0.97, 1.10),
    Expectation(IN_CACHE.name, Figure.PERPLEXITY, 1024, _COVERED, 0.98, 1.02),
    Expectation(IN_CACHE.name, Figure.PERPLEXITY, 4096, _SINKS, 0.97, 1.10),
    Expectation(FULL.name, Figure.FOUND, 1024, _TASK, 0.75),
    Expectation(FULL.name, Figure.FOUND, 4096, _TASK, 0.75),
    Expectation(SELECTION.name, Figure.FOUND, 4096, _SELECTION, 0.75),
    Expectation(FULL.name, Figure.FOUND, 1024, _TASK, 0.85, task=MANY),
    Expectation(FULL.name, Figure.FOUND, 4096, _TASK, 0.7, task=MANY),
    Expectation(SINKS.name, Figure.FOUND, 1024, _INSIDE, 0.75, depths=(0.6, 1.0), task=MANY),
    Expectation(SINKS.name, Figure.FOUND, 1024, _OUTSIDE, most=0.1, depths=(0.0, 0.4), task=MANY),
    Expectation(SINKS.name, Figure.FOUND, 4096, _OUTSIDE, most=0.1, depths=(0.0, 0.8), task=MANY),
    Expectation(SINKS.name, Figure.LOGPROB, 1024, _INSIDE, -0.15, 0.15, depths=(0.6, 1.0)),
    Expectation(SINKS.name, Figure.LOGPROB, 1024, _OUTSIDE, 1.2, depths=(0.0, 0.4)),
    Expectation(SINKS.name, Figure.LOGPROB, 4096, _OUTSIDE, 1.2, depths=(0.0, 0.8)),
    Expectation(SELECTION.name, Figure.LOGPROB, 4096, _SELECTION, -0.2, 0.8),
    Expectation(IN_CACHE.name, Figure.LOGPROB, 1024, _COVERED, -0.05, 0.05),
    Expectation(FULL.name, Figure.MEMORY, 4096, _KEPT, 3.9, 4.1, shorter=1024),
    Expectation(SINKS.name, Figure.MEMORY, 4096, _FREED, 0.95, 1.05, shorter=1024),
    Expectation(FULL.name, Figure.TPOT, 4096, _READ, 1.1, shorter=1024),
    Expectation(SINKS.name, Figure.TPOT, 4096, _READ, 0.9, 1.1, shorter=1024),
)
"""The known figures."""
