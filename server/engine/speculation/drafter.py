"""Drafting: tokens that are guessed, for one step to verify together.

Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, ICML 2023. Verification
is stricter than theirs (section 2.3): a draft is accepted only while it is the very token that the model
samples there, which depends on logits, seed and position alone (``server.engine.chance``). So no token
changes, whether greedy or drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Listed

from attention.rope import LengthRope
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence
from server.engine.speculation.timing import Load, Timing


class Drafter(ABC):
    """Guesses tokens of sequences that decode, as many as pay.

    The ``i``-th draft of a sequence is output with a probability of about its acceptance to the power of
    ``i``. It is made if that is enough for what it costs, by the last steps' durations (``Timing``).

    Args:
        most: drafted tokens of a sequence in a step.
        context_length: most tokens of a sequence.
        rope: rotary embeddings whose frequencies depend on lengths.

    Attributes:
        caught_up: the step in the making computes more than itself and drafts, so that its duration tells
            nothing of others.
    """

    def __init__(self, most: int, context_length: int, rope: LengthRope | None) -> None:
        self.timing = Timing()
        self.caught_up = False
        self._most, self._context_length, self._rope = most, context_length, rope
        self._load = Load(0, 0)
        self._drafts = 0

    def ask(self, running: Listed[Sequence]) -> None:
        """Sets ``wanted_drafts`` of all running sequences, before a step is scheduled."""
        decoding = [sequence for sequence in running if sequence.remaining == 1]
        length = sum(sequence.total for sequence in decoding)
        self._load, self._drafts = Load(len(decoding), 1 << length.bit_length()), 0
        least = self.timing.least(self._load)
        most = self._most if self.timing.known(self._load) else 1
        for sequence in running:
            room = min(most, self._room_for(sequence))
            sequence.wanted_drafts = self.wanted(sequence, room, least) if room > 0 else 0

    def draft(self, scheduled: Listed[Scheduled]) -> None:
        """Sets ``drafts`` of the scheduled sequences: as many as were scheduled of those that each wanted."""
        drafts = {
            sequence: tokens - 1
            for sequence, tokens in scheduled
            if sequence.wanted_drafts and sequence.remaining == 1 and tokens > 1  # it may be preempted since
        }
        self._drafts = sum(drafts.values())
        if drafts:
            self.fill(drafts)

    def observe(self, seconds: float) -> None:
        """Takes the duration of the step that was asked for last; it computed no prompt."""
        self.timing.observe(self._load, seconds, self._drafts)

    @abstractmethod
    def wanted(self, sequence: Sequence, room: int, least: float) -> int:
        """How many tokens, at most ``room``, are right with at least the probability ``least``."""

    @abstractmethod
    def fill(self, drafts: dict[Sequence, int]) -> None:
        """Sets ``drafts`` of each sequence to so many tokens, which are no more than were wanted."""

    def _room_for(self, sequence: Sequence) -> int:
        """How many drafted tokens could be of use in the next step; none if that is below 1.

        None to a beam. None to a sequence whose next token is forced: each of these is decoded in a step of
        its own. None where repeats are banned, which are found among the tokens that are output already. With
        frequencies that depend on lengths, none of those that would have other ones.
        """
        if sequence.group is not None:
            return 0
        request, total = sequence.request, sequence.total
        begins = sequence.output_len < max(1, len(request.forced))
        if sequence.remaining != 1 or begins or request.sampling.no_repeat_ngram:
            return 0
        room = min(request.max_tokens - sequence.output_len, self._context_length - total) - 1
        if self._rope is None:
            return room
        stale = self._rope.stale
        return next((n - 1 for n in range(1, min(room, self._most) + 1) if stale(total + n)), room)
