"""Processor time of steps and messages, and the sizes of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np


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
    """Seconds of a core that computes alone, for each unit of ``Work``."""

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
        """From the seconds of steps of known work."""
        seconds = [each for _, each in measured]
        return cls(*least_squares([work for work, _ in measured], seconds, seconds))


@dataclass(frozen=True)
class LoopCost:
    """Seconds that a process takes beside the steps: for each request, step's message and token."""

    request: float = 0.0
    message: float = 0.0
    token: float = 0.0


@dataclass(frozen=True)
class Limits:
    """An engine's sizes; see ``server.engine.scheduler.Scheduler`` and ``server.engine.pace.Pace``."""

    pages: int
    page_size: int
    max_running: int
    max_batch_tokens: int
    max_prefills: int
    prompt_step_seconds: float
    reach: float
    aging: float
    gives_up: bool
    context_length: int
    vocabulary: int


@dataclass(frozen=True)
class Costs:
    """All that is measured of a replica.

    Attributes:
        step: of the engine.
        engine: of its process, beside the steps.
        server: of the server process.
        client: of the process that sends, for all replicas.
        cores: of the machine.
        beside: see ``Processors``.
        limits: of the engine.
        machine: where it was measured.
    """

    step: StepCost
    engine: LoopCost
    server: LoopCost
    client: LoopCost
    cores: int
    beside: float
    limits: Limits
    machine: str

    def __str__(self) -> str:
        step = astuple(self.step)
        each = zip(step, (1e3, 1e3, 1e6, 1e3, 1e6), strict=True)
        base, decode, context, token, pair = (cost * unit for cost, unit in each)
        lines = [
            f"{self.machine}; a core's speed beside another that computes: {self.beside:.2f}",
            f"step: {base:.2f} ms + {decode:.2f} a decode + {context:.2f} a 1,000 tokens that it sees "
            f"+ {token:.3f} a prompt token + {pair:.2f} a 1,000 that this sees",
        ]
        for name in ("engine", "server", "client"):
            own = [1e6 * cost for cost in astuple(getattr(self, name))]
            lines.append("{}: {:.0f} µs a request, {:.0f} a step, {:.0f} a token".format(name, *own))
        return "\n".join(lines)


def least_squares(
    rows: Sequence[Sequence[float]], seconds: Sequence[float], scale: Sequence[float]
) -> list[float]:
    """Coefficients of at least 0 by which rows give seconds with the least sum of squared errors.

    Args:
        rows: what was done.
        seconds: that it took.
        scale: to which an error is relative, of each row.
    """
    weights = 1 / np.asarray(scale)
    matrix, kept = np.asarray(rows, float) * weights[:, None], list(range(len(rows[0])))
    found = np.zeros(len(kept))
    while kept:
        part, *_ = np.linalg.lstsq(matrix[:, kept], np.asarray(seconds) * weights, rcond=None)
        if part.min() >= 0:
            found[kept] = part
            break
        del kept[int(part.argmin())]  # what comes out below 0 is not there
    return [float(each) for each in found]
