"""A drafter that knows the outputs, for tests of what becomes of drafts, and one's costs."""

from __future__ import annotations

import random
from collections.abc import Mapping

from attention.rope import LengthRope
from server.engine.sequence import Sequence
from server.engine.speculation.drafter import Drafter
from server.engine.speculation.timing import Timing


class KnowingDrafter(Drafter):
    """Drafts each sequence's own output, at times with a wrong token, which others may follow.

    However long it takes, it goes on.

    Args:
        outputs: of each sequence, by id.
        most: drafted tokens of a sequence in a step.
        context_length: most tokens of a sequence.
        wrong: the probability that a token is another one.
        rng: draws these, and how many tokens are wanted.
        vocabulary: tokens to take wrong ones from.
        rope: of the runner.
    """

    def __init__(
        self,
        outputs: Mapping[int, list[int]],
        most: int,
        context_length: int,
        wrong: float,
        rng: random.Random,
        vocabulary: int,
        rope: LengthRope | None = None,
    ) -> None:
        super().__init__(most, context_length, rope)
        self.timing.known = lambda load: True
        self.outputs, self.wrong, self.rng, self.vocabulary = outputs, wrong, rng, vocabulary

    def wanted(self, sequence: Sequence, room: int, least: float) -> int:
        return self.rng.randint(room // 2, room)

    def fill(self, drafts: Mapping[Sequence, int]) -> None:
        for sequence, count in drafts.items():
            output, first = self.outputs[sequence.id], sequence.output_len
            for at in range(first, first + count):
                # A stop token or an abort may have ended the output before.
                known = at < len(output) and self.rng.random() >= self.wrong
                sequence.drafts.append(output[at] if known else self.rng.randrange(self.vocabulary))


class Paying(Timing):
    """As if drafting cost nothing."""

    def known(self, load):
        return True

    def least(self, load):
        return 0.2
