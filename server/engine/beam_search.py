"""Beam search as transformers' ``generate`` has it: which beams go on, which are finished, and when it ends.

Graves: Sequence Transduction with Recurrent Neural Networks, 2012; the length penalty and the rules for its
end are those of transformers' ``_beam_search``, so that the same scores give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from server.messages import Submit


class Beam(NamedTuple):
    """A beginning of the output, with the sum of its log probabilities; of a finished one, penalized."""

    tokens: list[int]
    score: float


class Continuation(NamedTuple):
    """A token that may follow a beam, given by its index, with the sum of log probabilities."""

    beam: int
    token: int
    score: float


class BeamSearch:
    """The search for one output.

    Args:
        request: with ``beams``.

    Attributes:
        running: beams to continue, the best first; none when the search has ended.
        finished: the best finished ones, at most as many as there are beams, the best first.
    """

    def __init__(self, request: Submit) -> None:
        assert request.beams is not None
        self._beams, self._stops = request.beams, frozenset(request.stop_token_ids)
        self._max_tokens, self._forced = request.max_tokens, len(request.forced)
        self._improvable = True
        self.running = [Beam([], 0.0)]
        self.finished: list[Beam] = []

    def advance(
        self, likeliest: Sequence[Continuation], unending: Sequence[Continuation]
    ) -> Sequence[Continuation]:
        """One step.

        Args:
            likeliest: the best continuations of all beams, as many as there are beams, the best first.
            unending: the same of those whose token is no stop token.

        Returns:
            Those that ``running`` now are, in this order.
        """
        beams, count, length = self._beams, self._beams.count, len(self.running[0].tokens) + 1
        ends = length == self._max_tokens
        full = len(self.finished) == count and beams.early_stopping == "full"
        if self._improvable and not full:
            new = [
                Beam([*self.running[one.beam].tokens, one.token], one.score / length**beams.length_penalty)
                for one in likeliest
                if ends or (one.token in self._stops and length > self._forced)
            ]
            self.finished = sorted([*self.finished, *new], key=lambda beam: -beam.score)[:count]
        going_on = [] if ends else unending
        self.running = [Beam([*self.running[one.beam].tokens, one.token], one.score) for one in going_on]
        self._improvable = self._improvable and self._may_improve()
        full = len(self.finished) == count and beams.early_stopping == "full"
        if full or not self._improvable:
            self.running = []
        return going_on if self.running else ()

    def _may_improve(self) -> bool:
        """Whether the best running beam may still better the worst finished one, as far as is looked."""
        if not self.running or len(self.finished) < self._beams.count:
            return bool(self.running)
        best, penalty = self.running[0], self._beams.length_penalty
        longest = self._beams.early_stopping == "never" and penalty > 0
        length = self._max_tokens if longest else len(best.tokens)
        return best.score / length**penalty > self.finished[-1].score
