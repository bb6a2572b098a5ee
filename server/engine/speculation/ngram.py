"""Prompt look-up: what followed the last tokens when they came before is guessed to follow again.

Saxena: Prompt Lookup Decoding, 2023 (github.com/apoorvumang/prompt-lookup-decoding). It needs no second
model, and helps where the output repeats the prompt or itself: editing, quoting, code, retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

from server.engine.sequence import Sequence
from server.engine.speculation.acceptance import Acceptance, Guessed
from server.engine.speculation.drafter import Drafter

LENGTHS = (4, 2)
"""Tokens that must have come before, the longest first."""

AT_ONCE = 512
"""Tokens whose places are noted before a step, of all sequences together: each takes some microseconds, all
streams wait for them, and the prefix cache may have a long prompt as a whole."""

_LEAST = 16  # of each sequence

_FIRST = 0.5


class Lookup:
    """Where each run of tokens of a sequence came last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def note(self, tokens: Listed[int], most: int) -> None:
        """Notes the places of the next ``most`` of ``tokens``, which begin with those of the last call."""
        # Of the last tokens it is not known yet what follows.
        begin, self._known = self._known, min(len(tokens), self._known + most)
        for end in range(begin, self._known):
            for length in LENGTHS:
                if end >= length:
                    self._ends[tuple(tokens[end - length : end])] = end

    def guess(self, tokens: Listed[int], most: int) -> tuple[list[int], int]:
        """At most ``most`` tokens that may follow ``tokens``, by the places noted so far.

        Where a sequence has begun to repeat, the following tokens are those of the guess itself.

        Returns:
            The tokens, and how many of the last ones came before; none, and 0, where too few did.
        """
        total = len(tokens)
        for length in LENGTHS:
            before = self._ends.get(tuple(tokens[-length:])) if total > length else None
            if before is not None:
                guess = list(tokens[before : before + most])
                while len(guess) < most:
                    guess.append(guess[len(guess) - (total - before)])
                return guess, length
        return [], 0


class _State:
    """Of one sequence: guesses after longer runs are right more often, so that each length has its share."""

    def __init__(self) -> None:
        self.lookup = Lookup()
        self.by_length = {length: Guessed(Acceptance(_FIRST)) for length in (*LENGTHS, 0)}
        self.last = self.by_length[0]


class NgramDrafter(Drafter):
    """See ``Drafter``. A guess costs nothing, and each is held against what is sampled, drafted or not."""

    def ask(self, running: Listed[Sequence]) -> None:
        """See ``Drafter.ask``. Places of a prompt's tokens are noted while it is computed."""
        share = max(self._most + 1, _LEAST, AT_ONCE // max(1, len(running)))
        for sequence in running:
            if sequence.drafting is None:
                sequence.drafting = _State()
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
