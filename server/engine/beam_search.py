"""Beam search as transformers' ``generate`` has it: which beams go on, which are finished, and when it ends.

Graves: Sequence Transduction with Recurrent Neural Networks, 2012; the length penalty and the rules for its
end are those of transformers' ``_beam_search``, so that the same scores give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from server.messages import PositionLogprob, Submit
from server.text.assemble import OutputAssembler


class Beam(NamedTuple):
    """A beginning of the output.

    Attributes:
        tokens: of the output so far.
        score: the sum of their log probabilities, after penalties; of a finished beam, penalized by length.
        logprobs: of each token, where asked for.
        text: of its tokens, where stop strings may end it; the beam's own, and ended by none.
    """

    tokens: list[int]
    score: float
    logprobs: list[PositionLogprob]
    text: OutputAssembler | None


class Continuation(NamedTuple):
    """A token that may follow a beam.

    Attributes:
        beam: index of the beam.
        token: the token.
        score: the sum of log probabilities.
        logprob: the token's, as the model gives it, where asked for.
    """

    beam: int
    token: int
    score: float
    logprob: PositionLogprob | None = None


class BeamSearch:
    """The search for one output.

    Args:
        request: with ``beams``.
        text: of no token, where the request has stop strings.

    Attributes:
        running: beams to continue, the best first; none when the search has ended.
        finished: the best finished ones, at most as many as there are beams, the best first.
    """

    def __init__(self, request: Submit, text: OutputAssembler | None = None) -> None:
        assert request.beams is not None
        self._beams, self._stops = request.beams, frozenset(request.stop_token_ids)
        self._max_tokens, self._forced = request.max_tokens, len(request.forced)
        self._improvable = True
        self.running = [Beam([], 0.0, [], text)]
        self.finished: list[Beam] = []

    def advance(
        self, likeliest: Sequence[Continuation], unending: Sequence[Continuation]
    ) -> Sequence[Continuation]:
        """One step.

        Args:
            likeliest: the best continuations of all beams, as many as there are beams, the best first.
            unending: the same of those whose token is no stop token; where stop strings may end a beam, twice
                as many.

        Returns:
            Those that ``running`` now are, in this order.
        """
        beams, count, length = self._beams, self._beams.count, len(self.running[0].tokens) + 1
        ends = length == self._max_tokens
        full = len(self.finished) == count and beams.early_stopping == "full"
        if self._improvable and not full:
            new = [
                beam._replace(score=beam.score / length**beams.length_penalty, text=None)
                for beam, stopped in map(self._follow, likeliest)
                if ends or stopped
            ]
            self.finished = sorted([*self.finished, *new], key=lambda beam: -beam.score)[:count]
        followed = [] if ends else [(one, *self._follow(one)) for one in unending]
        going_on = [(one, beam) for one, beam, stopped in followed if not stopped][:count]
        self.running = [beam for _, beam in going_on]
        self._improvable = self._improvable and self._may_improve()
        full = len(self.finished) == count and beams.early_stopping == "full"
        if full or not self._improvable:
            self.running = []
        return [one for one, _ in going_on] if self.running else ()

    def _follow(self, one: Continuation) -> tuple[Beam, bool]:
        """A beam with a token more, and whether a stop token or a stop string ends it."""
        before = self.running[one.beam]
        tokens, text = [*before.tokens, one.token], before.text
        stopped = one.token in self._stops and len(tokens) > self._forced
        if text is not None and not stopped:
            text = text.fork()
            stopped = text.push([one.token]).finish is not None
        logprobs = before.logprobs if one.logprob is None else [*before.logprobs, one.logprob]
        return Beam(tokens, one.score, logprobs, text), stopped

    def _may_improve(self) -> bool:
        """Whether the best running beam may still better the worst finished one, as far as is looked."""
        if not self.running or len(self.finished) < self._beams.count:
            return bool(self.running)
        best, penalty = self.running[0], self._beams.length_penalty
        longest = self._beams.early_stopping == "never" and penalty > 0
        length = self._max_tokens if longest else len(best.tokens)
        return best.score / length**penalty > self.finished[-1].score
