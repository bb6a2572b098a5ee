"""Prompt look-up: what followed the last tokens when they came before is guessed to follow again.

Saxena: Prompt Lookup Decoding, 2023 (github.com/apoorvumang/prompt-lookup-decoding). It needs no second
model, and helps where the output repeats the prompt or itself: editing, quoting, code, retrieval.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Listed

from server.engine.sequence import Sequence
from server.engine.speculation.acceptance import Acceptance, Guessed
from server.engine.speculation.drafter import Drafter

LENGTHS = (4, 2)
"""Tokens that must have come before, the longest first."""

AT_ONCE = 512
"""Tokens whose places are noted before a step, of all sequences together: each takes some microseconds, all
streams wait for them, and the prefix cache may have a long prompt as a whole."""

MOST = 1 << 17
"""Tokens of a sequence whose places are known, the last ones: so many take 2 MiB."""

_LEAST = 16  # of each sequence

_LOOKS = 8  # at places with an equal hash, of which nearly all are those looked for

_FIRST = 0.5


class Lookup:
    """Where each run of tokens of a sequence came before, the last ``MOST`` places.

    Chains of places by hash, as of zlib's deflate: 16 bytes for a token, and up to as much again since the
    tables' size is a power of two. A dictionary of runs would take some 230 bytes for each.

    Args:
        limit: tokens that the sequence will have at most.
    """

    def __init__(self, limit: int) -> None:
        size = 1 << (min(max(limit, 2), MOST) - 1).bit_length()
        self._mask = size - 1
        # Of each length the last place of each hash, and of each place the one before it with that hash;
        # 0 where there is none, since no run ends before the first token.
        self._last = {length: array("I", bytes(4 * size)) for length in LENGTHS}
        self._before = {length: array("I", bytes(4 * size)) for length in LENGTHS}
        self._known = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its tables."""
        return 2 * len(LENGTHS) * 4 * (self._mask + 1)

    def note(self, tokens: Listed[int], most: int) -> None:
        """Notes the places of the next ``most`` of ``tokens``, which begin with those of the last call."""
        # Of the last tokens it is not known yet what follows.
        begin, self._known = self._known, min(len(tokens), self._known + most)
        mask = self._mask
        for length in LENGTHS:
            last, before = self._last[length], self._before[length]
            for end in range(max(begin, length), self._known):
                slot = hash(tuple(tokens[end - length : end])) & mask
                before[end & mask] = last[slot]
                last[slot] = end

    def guess(self, tokens: Listed[int], most: int) -> tuple[list[int], int]:
        """At most ``most`` tokens that may follow ``tokens``, by the places noted so far.

        Where a sequence has begun to repeat, the following tokens are those of the guess itself.

        Returns:
            The tokens, and how many of the last ones came before; none, and 0, where too few did.
        """
        total = len(tokens)
        for length in LENGTHS:
            before = self._find(tokens, length) if total > length else 0
            if before:
                guess = list(tokens[before : before + most])
                while len(guess) < most:
                    guess.append(guess[len(guess) - (total - before)])
                return guess, length
        return [], 0

    def _find(self, tokens: Listed[int], length: int) -> int:
        """The last place noted at which the last ``length`` of ``tokens`` came before; 0 if none is found."""
        run = tokens[-length:]
        place = self._last[length][hash(tuple(run)) & self._mask]
        oldest = max(0, self._known - self._mask - 1)  # a newer place has the memory of those before it
        for _ in range(_LOOKS):
            if place < length or place < oldest:
                return 0
            if tokens[place - length : place] == run:
                return place
            place = self._before[length][place & self._mask]
        return 0


class _State:
    """Of one sequence: guesses after longer runs are right more often, so that each length has its share."""

    def __init__(self, limit: int) -> None:
        self.lookup = Lookup(limit)
        self.by_length = {length: Guessed(Acceptance(_FIRST)) for length in (*LENGTHS, 0)}
        self.last = self.by_length[0]


class NgramDrafter(Drafter):
    """See ``Drafter``. A guess costs nothing, and each is held against what is sampled, drafted or not."""

    def ask(self, running: Listed[Sequence]) -> None:
        """See ``Drafter.ask``. Places of a prompt's tokens are noted while it is computed."""
        share = max(self._most + 1, _LEAST, AT_ONCE // max(1, len(running)))
        for sequence in running:
            if sequence.drafting is None:
                limit = sequence.prompt_len + sequence.request.max_tokens
                sequence.drafting = _State(min(limit, self._context_length))
            sequence.drafting.lookup.note(sequence.tokens, share)
        super().ask(running)

    def wanted(self, sequence: Sequence, room: int, least: float) -> int:
        """See ``Drafter.wanted``."""
        state: _State = sequence.drafting
        state.last.learn(sequence.tokens)
        guess, length = state.lookup.guess(sequence.tokens, room)
        last = state.last = state.by_length[length]
        last.guess, last.total = guess, sequence.total
        return min(len(guess), last.acceptance.worth(least))

    def fill(self, drafts: dict[Sequence, int]) -> None:
        """See ``Drafter.fill``."""
        for sequence, count in drafts.items():
            sequence.drafts = sequence.drafting.last.guess[:count]
