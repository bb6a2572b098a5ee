"""Prompt look-up: what followed the last tokens when they came before is guessed to follow again.

Saxena: Prompt Lookup Decoding, 2023 (github.com/apoorvumang/prompt-lookup-decoding). It needs no second
model, and helps where the output repeats the prompt or itself: editing, quoting, code, retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

from server.engine.sequence import Sequence
from server.engine.speculation.acceptance import Acceptance, Guessed
from server.engine.speculation.drafter import Drafter

LENGTHS = (4, 2)
"""Tokens that must have come before, the longest first."""

_FIRST = 0.5


class Lookup:
    """Where each run of tokens of a sequence came last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def guess(self, tokens: Listed[int], most: int) -> list[int]:
        """At most ``most`` tokens that may follow ``tokens``, which begin with those of the last call.

        What follows reaches into the guess itself where a sequence has begun to repeat.
        """
        total = len(tokens)
        # Of the last tokens it is not known yet what follows.
        for end in range(self._known, total):
            for length in LENGTHS:
                if end >= length:
                    self._ends[tuple(tokens[end - length : end])] = end
        self._known = total
        found = (self._ends.get(tuple(tokens[-length:])) for length in LENGTHS if total > length)
        end = next((end for end in found if end is not None), total)
        if end == total:
            return []
        guess = list(tokens[end : end + most])
        while len(guess) < most:
            guess.append(guess[len(guess) - (total - end)])
        return guess


@dataclass(slots=True)
class _State(Guessed):
    lookup: Lookup = field(default_factory=Lookup)


class NgramDrafter(Drafter):
    """See ``Drafter``. A guess costs nothing, and each is held against what is sampled, drafted or not."""

    def wanted(self, sequence: Sequence, room: int, least: float) -> int:
        """See ``Drafter.wanted``."""
        if sequence.drafting is None:
            sequence.drafting = _State(Acceptance(_FIRST))
        state: _State = sequence.drafting
        state.learn(sequence.tokens)
        state.guess, state.total = state.lookup.guess(sequence.tokens, room), sequence.total
        return min(len(state.guess), state.acceptance.worth(least))

    def fill(self, drafts: dict[Sequence, int]) -> None:
        """See ``Drafter.fill``."""
        for sequence, count in drafts.items():
            sequence.drafts = sequence.drafting.guess[:count]
