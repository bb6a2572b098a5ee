"""Another, smaller model as drafter: its keys lie in a cache of its own, in pages of the same numbers.

Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, ICML 2023. The draft
model's cache has as many pages of as many tokens as that of the model that serves, and a sequence's page
table addresses both. So pages are allocated once, and equal prompts share their pages in both.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass
from itertools import takewhile

import torch

from attention.rope import LengthRope
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence
from server.engine.speculation.acceptance import Acceptance, Guessed
from server.engine.speculation.computing import ComputingDrafter
from server.models.executors.base import Executor

_FIRST = 0.6

SHORT = 4
"""Tokens without keys of the draft model that a draft computes first; for more there is a step without."""


@dataclass(slots=True)
class _Keyed(Guessed):
    """The drafter's data on a sequence.

    Attributes:
        keys: its leading tokens whose keys the draft model has written.
        life: of its page table, to which those pages belong.
    """

    keys: int = 0
    life: int = 0


class ModelDrafter(ComputingDrafter):
    """See ``ComputingDrafter``. A sequence is caught up with before anything is drafted for it.

    Pages that the prefix cache found are computed again, since it is not known whether the draft model has
    written them: with equal values, so that no other sequence's drafts change.

    Args:
        executor: the draft model over its own cache.
        most: see ``Drafter``, and the others too.
        context_length: see there, at most the draft model's.
        rope: see there; of the model that verifies.
        budget: tokens that are caught up with in a step, of all sequences together.
    """

    def __init__(
        self, executor: Executor, most: int, context_length: int, rope: LengthRope | None, budget: int
    ) -> None:
        super().__init__(executor, most, context_length, rope)
        self._budget = budget
        self._behind: set[Sequence] = set()

    def begin(self, sequence: Sequence) -> Guessed:
        """See ``ComputingDrafter.begin``."""
        return _Keyed(Acceptance(_FIRST), life=sequence.table.life)

    def keyed(self, sequence: Sequence) -> int:
        """See ``ComputingDrafter.keyed``."""
        keys: int = sequence.drafting.keys
        return keys

    def ask(self, running: Listed[Sequence]) -> None:
        """See ``Drafter.ask``."""
        self._behind.clear()
        super().ask(running)

    def wanted(self, sequence: Sequence, room: int, least: float) -> int:
        """See ``Drafter.wanted``. Of a sequence that is far behind none, until it is caught up with."""
        self._look(sequence)
        count = super().wanted(sequence, room, least)
        if count and sequence.computed - self.keyed(sequence) > SHORT:
            self._behind.add(sequence)
            return 0
        return count

    def draft(self, scheduled: Listed[Scheduled]) -> None:
        """See ``Drafter.draft``."""
        self._catch_up([sequence for sequence, _ in scheduled if sequence in self._behind])
        super().draft(scheduled)

    @staticmethod
    def _look(sequence: Sequence) -> None:
        """Finds how many keys are left, before the last guess is forgotten.

        A guess's tokens have keys as far as they were right, but for the last one: no token was drafted after
        it.
        """
        state: _Keyed | None = sequence.drafting
        if state is None:
            return
        if state.life != sequence.table.life:
            state.keys, state.life = 0, sequence.table.life
        elif state.guess:
            pairs = zip(state.guess[:-1], sequence.tokens[state.total :], strict=False)
            state.keys = state.total + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @torch.inference_mode()
    def _catch_up(self, behind: list[Sequence]) -> None:
        left, chunks = self._budget, {}
        for sequence in behind:
            # It may be preempted since, and even run again.
            if sequence.remaining == 1 and sequence.drafting.life == sequence.table.life:
                keys = self.keyed(sequence)
                if chunk := sequence.tokens[keys : min(sequence.computed, keys + left)]:
                    chunks[sequence] = chunk
                    left -= len(chunk)
        self.caught_up = bool(chunks)
        if not chunks:
            return
        ends = [self.keyed(sequence) + len(chunk) for sequence, chunk in chunks.items()]
        self.compute(list(chunks), list(chunks.values()), ends, rows=[])
        for sequence, end in zip(chunks, ends, strict=True):
            sequence.drafting.keys = end
