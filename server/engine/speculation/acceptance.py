"""How often a sequence's drafts turn out right, and how many are therefore worth their cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_MEMORY = 0.95
"""Weight of a drafted token in the estimate once the next one is known."""

_WEIGHT = 2.0
"""Drafted tokens that what is thought at first weighs as much as."""

_LEAST, _MOST = 0.01, 0.99


class Acceptance:
    """The share of drafted tokens that the model samples too, once those before it were right.

    Taken as the same for each of a sequence's drafts and as independent of the others.

    Args:
        first: what it is thought to be at first.
    """

    def __init__(self, first: float) -> None:
        self._right, self._tried = first * _WEIGHT, _WEIGHT

    @property
    def rate(self) -> float:
        """The estimate from the last drafts, weighted by ``_MEMORY``; kept off 0 and 1."""
        return min(max(self._right / self._tried, _LEAST), _MOST)

    def learn(self, guessed: Sequence[int], sampled: Sequence[int]) -> None:
        """Takes some guessed tokens and those that were sampled in their places, or as many as are known."""
        known = min(len(guessed), len(sampled))
        right = next((i for i in range(known) if guessed[i] != sampled[i]), known)
        tried = right + (right < known)
        kept = _MEMORY**tried
        self._right = kept * self._right + right
        self._tried = kept * self._tried + tried

    def worth(self, least: float) -> int:
        """How many drafts in a row will each be output with at least the probability ``least``."""
        return max(0, int(math.log(max(least, _LEAST)) / math.log(self.rate)))


@dataclass(slots=True)
class Guessed:
    """A drafter's data on a sequence.

    Attributes:
        acceptance: of its drafts.
        guess: tokens that were thought to follow its first ``total`` ones.
        total: tokens of the sequence when it was guessed.
    """

    acceptance: Acceptance
    guess: list[int] = field(default_factory=list)
    total: int = 0

    def learn(self, tokens: Sequence[int]) -> None:
        """Holds the guess against the sequence's tokens, once."""
        self.acceptance.learn(self.guess, tokens[self.total :])
        self.guess = []
