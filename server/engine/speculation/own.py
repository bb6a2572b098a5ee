"""The model as its own drafter: under a pattern that sees less of the same KV cache.

Chen et al.: MagicDec: Breaking the Latency-Throughput Tradeoff for Long Context Generation with Speculative
Decoding, 2024, section 4; Sun et al.: TriForce, 2024. The longer the context, the less of a step's time such
a draft takes. It writes keys of its own where verification will write those of the step, in each layer before
they are read.
"""

from __future__ import annotations

import torch

from attention.rope import LengthRope
from server.engine import sampler
from server.engine.row import Row
from server.engine.sequence import Sequence
from server.engine.speculation.acceptance import Acceptance, Guessed
from server.engine.speculation.drafter import Drafter
from server.engine.speculation.timing import AGAIN
from server.models.executors.base import Executor, StepInput

_FIRST = 0.9


class SelfDrafter(Drafter):
    """See ``Drafter``. A sequence whose drafts don't pay is tried again with one token now and then.

    Args:
        executor: the model over the cache of the steps, under a pattern that selects by positions.
        most: drafted tokens of a sequence in a step.
        context_length: most tokens of a sequence.
        rope: rotary embeddings whose frequencies depend on lengths.

    Attributes:
        attention: pattern and kernel of the drafts.
    """

    def __init__(self, executor: Executor, most: int, context_length: int, rope: LengthRope | None) -> None:
        super().__init__(most, context_length, rope)
        self._executor = executor
        self.attention = executor.attention

    def wanted(self, sequence: Sequence, room: int, least: float) -> int:
        """See ``Drafter.wanted``."""
        if sequence.drafting is None:
            sequence.drafting = Guessed(Acceptance(_FIRST))
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

    def _next(self, sequences: list[Sequence]) -> list[int]:
        """A token more for each, sampled with the randomness that verification will have."""
        ahead = [len(sequence.drafts) for sequence in sequences]
        step = StepInput(
            ids=torch.tensor([(s.drafts or s.tokens)[-1] for s in sequences]),
            computed=[s.computed + n for s, n in zip(sequences, ahead, strict=True)],
            counts=[1] * len(sequences),
            prompt_lens=[s.prompt_len for s in sequences],
            expected=[s.expected + n for s, n in zip(sequences, ahead, strict=True)],
            tables=[s.table for s in sequences],
            page_size=self._executor.cache.page_size,
        )
        logits = self._executor.logits(step)
        rows = []
        for s, n in zip(sequences, ahead, strict=True):
            assert s.sampler is not None  # it has output a token
            unrecorded = torch.tensor(s.drafts) if n and s.request.sampling.penalized else None
            rows.append(Row(s.sampler, s.output_len + n, None, unrecorded))
        tokens: list[int] = sampler.sample(logits, rows).tokens.tolist()
        return tokens
