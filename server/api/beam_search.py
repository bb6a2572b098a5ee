"""Beam search as transformers' ``generate`` has it: which beams go on, which are finished, and when it ends.

Graves: Sequence Transduction with Recurrent Neural Networks, 2012; the length penalty and the rules for its
end are those of transformers' ``_beam_search``, so that the same scores give the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

EarlyStopping = Literal["heuristic", "full", "never"]


class Beam(NamedTuple):
    """A beginning of the output, with the sum of its log probabilities; of a finished one, penalized."""

    tokens: list[int]
    score: float


class _Longer(NamedTuple):
    """A beam and a token that may follow, with the sum of log probabilities. Few of those become beams."""

    begun: Beam
    token: int
    score: float

    @property
    def length(self) -> int:
        return len(self.begun.tokens) + 1

    def beam(self, length_penalty: float = 0.0) -> Beam:
        """With its score penalized."""
        return Beam([*self.begun.tokens, self.token], self.score / self.length**length_penalty)


@dataclass(frozen=True, slots=True)
class Beams:
    """How to search.

    Attributes:
        count: beams that go on from each step.
        length_penalty: a finished beam's score is divided by its length to this power.
        early_stopping: ``full``: it ends with ``count`` finished beams. ``heuristic``: when the best beam
            that goes on, at its length, does not better the worst of these; ``never``: at any length, where
            ``length_penalty`` is positive.
    """

    count: int
    length_penalty: float
    early_stopping: EarlyStopping


class BeamSearch:
    """The search for one output.

    Args:
        beams: how to search.
        stops: the tokens that end a beam.
        max_tokens: of a beam.

    Attributes:
        running: beams to continue, the best first; none when the search has ended.
        finished: the best finished ones, at most ``beams.count``, the best first.
    """

    def __init__(self, beams: Beams, stops: Collection[int], max_tokens: int) -> None:
        self._beams, self._stops, self._max_tokens = beams, frozenset(stops), max_tokens
        self._improvable = True
        self.running = [Beam([], 0.0)]
        self.finished: list[Beam] = []

    @property
    def wanted(self) -> int:
        """How many of the most likely next tokens of each beam ``advance`` has to know.

        Of these at least ``count`` end no beam, and of one beam no more go on.
        """
        return self._beams.count + len(self._stops)

    def advance(self, following: Sequence[dict[int, float]]) -> None:
        """One step.

        Args:
            following: for each running beam, log probabilities of the most likely tokens that may follow.
        """
        beams, count = self._beams, self._beams.count
        found = [
            _Longer(beam, token, beam.score + logprob)
            for beam, tokens in zip(self.running, following, strict=True)
            for token, logprob in tokens.items()
        ]
        looked_at = max(2, 1 + len(self._stops)) * count
        best = sorted(found, key=lambda longer: -longer.score)[:looked_at]
        ended = [self._ends(longer) for longer in best]
        going_on = (longer for longer, end in zip(best, ended, strict=True) if not end)
        self.running = [longer.beam() for longer in islice(going_on, count)]
        full = len(self.finished) == count and beams.early_stopping == "full"
        if self._improvable and not full:
            new = [
                longer.beam(beams.length_penalty)
                for longer, end in zip(best[:count], ended, strict=False)
                if end
            ]
            self.finished = sorted([*self.finished, *new], key=lambda beam: -beam.score)[:count]
        self._improvable = self._improvable and self._may_improve()
        full = len(self.finished) == count and beams.early_stopping == "full"
        if all(ended) or full or not self._improvable:
            self.running = []

    def _ends(self, longer: _Longer) -> bool:
        return longer.token in self._stops or longer.length == self._max_tokens

    def _may_improve(self) -> bool:
        """Whether the best running beam may still better the worst finished one, as far as is looked."""
        if not self.running or len(self.finished) < self._beams.count:
            return bool(self.running)
        best, penalty = self.running[0], self._beams.length_penalty
        longest = self._beams.early_stopping == "never" and penalty > 0
        length = self._max_tokens if longest else len(best.tokens)
        return best.score / length**penalty > self.finished[-1].score


def best_of(logprobs: dict[int, float], banned: Collection[int], forced: int | None) -> dict[int, float]:
    """The tokens that may follow a beam; a forced one is certain."""
    if forced is not None:
        return {forced: 0.0}
    return {
        token: logprob for token, logprob in logprobs.items() if token not in banned and logprob > -math.inf
    }
