"""The model as its own drafter: under a pattern that sees less of the same KV cache.

Chen et al.: MagicDec: Breaking the Latency-Throughput Tradeoff for Long Context Generation with Speculative
Decoding, 2024, section 4; Sun et al.: TriForce, 2024. The longer the context, the less of a step's time such
a draft takes. It writes keys of its own where verification will write those of the step, in each layer before
they are read.
"""

from __future__ import annotations

from server.engine.sequence import Sequence
from server.engine.speculation.acceptance import Acceptance, Guessed
from server.engine.speculation.computing import ComputingDrafter

_FIRST = 0.9


class SelfDrafter(ComputingDrafter):
    """See ``ComputingDrafter``; the executor is over the cache of the steps, its pattern one by positions."""

    def begin(self, sequence: Sequence) -> Guessed:
        """See ``ComputingDrafter.begin``."""
        return Guessed(Acceptance(_FIRST))

    def keyed(self, sequence: Sequence) -> int:
        """See ``ComputingDrafter.keyed``: those that the steps computed."""
        return sequence.computed
