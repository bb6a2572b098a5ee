"""Processor time of steps and messages, and the sizes of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np

_SHORT = 0.1
"""Seconds: errors of less are relative to this, since processor time is counted in hundredths of a second."""


class Work(NamedTuple):
    """The contents of a step, or of several.

    Attributes:
        steps: how many.
        decodes: sequences that compute one token.
        context: earlier tokens that these see, summed.
        tokens: of prompts.
        pairs: earlier tokens that each of those sees, summed.
    """

    steps: int
    decodes: int
    context: int
    tokens: int
    pairs: float

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]]) -> Work:
        """A step's, whose chunks are given each by its first position and its number of tokens."""
        decodes = context = tokens = 0
        pairs = 0.0
        for start, count in chunks:
            if count == 1:
                decodes, context = decodes + 1, context + start
            else:
                tokens, pairs = tokens + count, pairs + count * (start + count / 2)
        return cls(1, decodes, context, tokens, pairs)


@dataclass(frozen=True)
class StepCost:
    """Processor seconds for each unit of ``Work``."""

    step: float
    decode: float
    context: float
    token: float
    pair: float

    def of(self, work: Work) -> float:
        """Seconds that it takes."""
        return (
            self.step * work.steps
            + self.decode * work.decodes
            + self.context * work.context
            + self.token * work.tokens
            + self.pair * work.pairs
        )

    @classmethod
    def fit(cls, measured: Sequence[tuple[Work, float]]) -> StepCost:
        """From the seconds of known work."""
        return cls(*_least_squares([work for work, _ in measured], [seconds for _, seconds in measured]))


@dataclass(frozen=True)
class LoopCost:
    """Processor seconds of a server process or a client: for each request, step's message and token."""

    request: float = 0.0
    message: float = 0.0
    token: float = 0.0

    @classmethod
    def fit(cls, counts: Sequence[tuple[int, int, int]], seconds: Sequence[float]) -> LoopCost:
        """From the seconds of runs with so many of each."""
        return cls(*_least_squares(counts, seconds))


@dataclass(frozen=True)
class Limits:
    """An engine's sizes; see ``server.engine.scheduler.Scheduler`` and ``server.engine.pace.Pace``."""

    pages: int
    page_size: int
    max_running: int
    max_batch_tokens: int
    max_prefills: int
    prompt_step_seconds: float
    aging: float
    gives_up: bool
    context_length: int
    vocabulary: int


@dataclass(frozen=True)
class Costs:
    """All that is measured of a replica.

    Attributes:
        alone: of steps, where no other core computes any.
        beside: of steps, where another core does: cores share caches and memory, or are threads of one.
        crowded: of steps, where each core has those of two replicas to compute in turn: each finds the caches
            full of the other's. With four cores or more, which four replicas don't crowd, the same as beside.
        server: of the server process.
        client: of the process that sends, for all replicas.
        cores: of the machine.
        limits: of the engine.
        machine: where it was measured.
    """

    alone: StepCost
    beside: StepCost
    crowded: StepCost
    server: LoopCost
    client: LoopCost
    cores: int
    limits: Limits
    machine: str

    def __str__(self) -> str:
        lines = [
            f"{self.machine}; ms of a step, a decode, a prompt token, and of 1,000 tokens that these see"
        ]
        for name in ("alone", "beside", "crowded"):
            step = getattr(self, name)
            each = (step.step, step.decode, step.token, 1e3 * step.context, 1e3 * step.pair)
            lines.append(f"  {name}: " + ", ".join(f"{1e3 * cost:.3f}" for cost in each))
        lines.append("µs of a request, a step's message, a token")
        for name in ("server", "client"):
            own = [1e6 * cost for cost in astuple(getattr(self, name))]
            lines.append("  {}: {:.0f}, {:.0f}, {:.0f}".format(name, *own))
        return "\n".join(lines)


def _least_squares(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of at least 0 by which rows give seconds with the least squares of relative errors."""
    wanted = np.asarray(seconds)
    weights = 1 / np.maximum(wanted, _SHORT)
    matrix, kept = np.asarray(rows, float) * weights[:, None], list(range(len(rows[0])))
    found = np.zeros(len(kept))
    while kept:
        part, *_ = np.linalg.lstsq(matrix[:, kept], wanted * weights, rcond=None)
        if part.min() >= 0:
            found[kept] = part
            break
        del kept[int(part.argmin())]  # what comes out below 0 is not there
    return [float(each) for each in found]
