"""Drafting with a model: tokens one by one, each sampled as the step that verifies it will sample."""

from __future__ import annotations

from abc import abstractmethod

import torch

from attention.rope import LengthRope
from server.engine import sampler
from server.engine.row import Row
from server.engine.sequence import Sequence
from server.engine.speculation.acceptance import Guessed
from server.engine.speculation.drafter import Drafter
from server.engine.speculation.timing import AGAIN
from server.models.executors.base import Executor, StepInput


class ComputingDrafter(Drafter):
    """See ``Drafter``. A sequence whose drafts don't pay is tried again with one token now and then.

    Args:
        executor: the model that drafts, over a cache that the sequences' page tables address.
        most: see ``Drafter``, and the others too.
        context_length: see there.
        rope: see there.

    Attributes:
        executor: the same.
        attention: pattern and kernel of the drafts.
    """

    def __init__(self, executor: Executor, most: int, context_length: int, rope: LengthRope | None) -> None:
        super().__init__(most, context_length, rope)
        self.executor = executor
        self.attention = executor.attention

    @abstractmethod
    def begin(self, sequence: Sequence) -> Guessed:
        """The state of a sequence for which nothing was drafted yet."""

    @abstractmethod
    def keyed(self, sequence: Sequence) -> int:
        """How many of its first tokens have keys that a draft can read; not its last token."""

    def wanted(self, sequence: Sequence, room: int, least: float) -> int:
        """See ``Drafter.wanted``."""
        if sequence.drafting is None:
            sequence.drafting = self.begin(sequence)
        state: Guessed = sequence.drafting
        state.learn(sequence.tokens)
        again = least <= 1 and sequence.total - max(state.total, sequence.prompt_len) >= AGAIN
        return min(room, max(state.acceptance.worth(least), int(again)))

    @torch.inference_mode()
    def fill(self, drafts: dict[Sequence, int]) -> None:
        """See ``Drafter.fill``."""
        left = dict(drafts)
        while left:
            for sequence, token in zip(left, self._next(list(left)), strict=True):
                sequence.drafts.append(max(0, token))  # negative where the logits are NaN
            left = {sequence: count - 1 for sequence, count in left.items() if count > 1}
        for sequence in drafts:
            sequence.drafting.guess, sequence.drafting.total = list(sequence.drafts), sequence.total

    def compute(
        self, sequences: list[Sequence], ids: list[list[int]], ends: list[int], *, rows: list[int] | None
    ) -> torch.Tensor:
        """The logits of ``rows``, as a step has them.

        Args:
            sequences: whose tokens to compute.
            ids: these tokens, of each.
            ends: tokens of each, those being computed included.
            rows: see ``StepInput.rows``.
        """
        counts = [len(tokens) for tokens in ids]
        step = StepInput(
            ids=torch.tensor([token for tokens in ids for token in tokens]),
            computed=[end - count for end, count in zip(ends, counts, strict=True)],
            counts=counts,
            prompt_lens=[s.prompt_len for s in sequences],
            expected=ends,
            tables=[s.table for s in sequences],
            page_size=self.executor.cache.page_size,
            rows=rows,
        )
        return self.executor.logits(step)

    def _next(self, sequences: list[Sequence]) -> list[int]:
        """A token more for each, sampled with the randomness that verification will have."""
        ids = [s.drafts[-1:] or s.tokens[self.keyed(s) :] for s in sequences]
        last, tokens = [], 0
        for part in ids:
            tokens += len(part)
            last.append(tokens - 1)
        ends = [s.total + len(s.drafts) for s in sequences]
        logits = self.compute(sequences, ids, ends, rows=None if tokens == len(ids) else last)
        rows = []
        for s in sequences:
            assert s.sampler is not None  # it has output a token
            n = len(s.drafts)
            unrecorded = torch.tensor(s.drafts) if n and s.request.sampling.penalized else None
            rows.append(Row(s.sampler, s.output_len + n, None, unrecorded))
        found: list[int] = sampler.sample(logits, rows).tokens.tolist()
        return found
