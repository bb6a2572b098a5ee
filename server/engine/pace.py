"""How much of prompts a step computes, so that it lasts about as long as it should."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

LEAST = 32
"""Cost of a step: with less, reading the weights costs more than computing with them."""

FIRST = 128
"""Tokens of the first step, before any duration is known."""

MULTIPLE = 16
"""Rows of a kernel's tile."""

_WEIGHTS = 4
"""Decodes that take as long as reading the weights does, once in every step: 1, 8 and 32 decodes of the
default model take 3.0, 6.9 and 21 ms."""

_ENOUGH = 0.75  # of what a step might take: a smaller one says nothing of the pace
_MEMORY = 0.98  # weight of a step in the estimate of the reach once the next one is seen
_DOUBT = 0.01  # weight of the expected reach; steps over positions a tenth of it apart weigh as much

_MOST = 64.0  # times that the reach is above or below the expected one

EXPECTED_REACH = 4096.0
"""Tokens; see ``Pace``. Of attention that computes at the rate of the layers, in a model of width 700."""


class Work(NamedTuple):
    """The prompt tokens of a step.

    Attributes:
        tokens: computed for sequences that lack more than one.
        pairs: the sum of their positions: how many earlier tokens each may see.
    """

    tokens: int
    pairs: float

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]]) -> Work:
        """The work of chunks, each given by its first position and its number of tokens."""
        tokens, pairs = 0, 0.0
        for start, count in chunks:
            tokens += count
            pairs += count * (start + count / 2)
        return cls(tokens, pairs)


class Pace:
    """The prompt tokens of the next step, from the durations of the last ones.

    A new request waits for the step that is under way, and streams that decode wait for every step. A token
    late in a prompt costs more than one at its start, since it sees more: the cost of a token at position
    ``p`` is ``1 + p / reach``, in units of a prompt's first token. The reach is estimated from the durations
    by least squares of relative errors, and a step's allowance from the last one.

    Args:
        seconds: that the prompt tokens of a step should take; ``None`` for as many tokens as there are.
        reach: as it is expected, before any duration is known.

    Attributes:
        known: a step's duration has been taken.
    """

    def __init__(self, seconds: float | None, reach: float = EXPECTED_REACH) -> None:
        self._seconds = seconds
        self._allowance = float(FIRST)
        self._decode = 0.0
        self._expected = reach
        self._reach = math.inf if seconds is None else reach
        self._sums: tuple[float, ...] = (0.0,) * 5
        self.known = False

    @property
    def allowance(self) -> float | None:
        """The cost of the next step's prompt tokens, at most; ``None`` for any."""
        return None if self._seconds is None else self._allowance

    def cost(self, start: int, tokens: int) -> float:
        """The cost of ``tokens`` tokens of a sequence from position ``start``."""
        return tokens + tokens * (start + tokens / 2) / self._reach

    def tokens(self, start: int, cost: float) -> int:
        """How many tokens from position ``start`` cost about so much.

        Where steps are kept short, the nearest multiple of a kernel's tile.
        """
        if self._seconds is None:
            return int(cost)
        per_token = 1 + start / self._reach
        number = 2 * cost / (per_token + math.sqrt(per_token**2 + 2 * cost / self._reach))
        return round(number / MULTIPLE) * MULTIPLE

    def observe(self, work: Work, decodes: int, seconds: float) -> None:
        """Takes the duration of a step.

        Args:
            work: its prompt tokens.
            decodes: sequences that decoded in the same step.
            seconds: its duration.
        """
        if self._seconds is None:
            return
        if not work.tokens:
            self._decode = seconds / (_WEIGHTS + decodes)
            return
        if self._cost_of(work) < _ENOUGH * self._allowance:
            return
        self.known = True
        of_decodes = (_WEIGHTS + decodes) * self._decode if decodes else 0.0
        own = max(seconds - of_decodes, seconds / 2, 1e-6)
        self._estimate_reach(work, own)
        # A step that was held up once says little of the next one.
        wanted = self._cost_of(work) * self._seconds / own
        self._allowance = max(LEAST, min(2 * self._allowance, max(self._allowance / 2, wanted)))

    def _cost_of(self, work: Work) -> float:
        return work.tokens + work.pairs / self._reach

    def _estimate_reach(self, work: Work, seconds: float) -> None:
        """Ridge regression of ``seconds = a * tokens + b * pairs``; the reach is ``a / b``.

        The ridge is ``a = expected * b``, since one prompt's first steps tell little of ``b``.
        """
        x, y = work.tokens / seconds, work.pairs / seconds
        new = (x * x, x * y, y * y, x, y)
        self._sums = tuple(_MEMORY * old + now for old, now in zip(self._sums, new, strict=True))
        xx, xy, yy, x1, y1 = self._sums
        ridge = _DOUBT * xx
        xy, yy, xx = xy - ridge * self._expected, yy + ridge * self._expected**2, xx + ridge
        a, b = x1 * yy - y1 * xy, y1 * xx - x1 * xy  # both times the determinant, which is positive
        self._reach = min(max(a, 0.0) / max(b, 1e-300), _MOST * self._expected)
        self._reach = max(self._reach, self._expected / _MOST)
