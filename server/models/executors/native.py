"""A packed model on the CPU: one native call computes all layers of a step, attention included."""

from __future__ import annotations

import torch

from attention.backends import Attention
from attention.cache import PagedCache
from attention.kernels.cpu.chain import Chain
from attention.kernels.cpu.chained import ChainedAttention
from attention.kernels.cpu.paged import CpuPaged
from server.models.executors.base import Executor, GivenUpError, StepInput
from server.models.executors.following import FollowingBatches
from server.models.executors.rotary import lengths_of, rope_in_force
from server.models.loaded import LoadedModel
from server.models.quantized.likely import LikelyTokens
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.model import QuantizedModel


class NativeExecutor(Executor):
    """See ``Executor``.

    Args:
        loaded: the model, such that ``obstacle`` finds nothing.
        attention: pattern and kernel.
        cache: keys and values of all layers.
        reason: why this executor.

    Raises:
        UnsupportedError: the pattern's in-cache positions don't go with how the model rotates its keys.
    """

    name = "native"

    def __init__(self, loaded: LoadedModel, attention: Attention, cache: PagedCache, reason: str) -> None:
        assert isinstance(loaded.model, QuantizedModel)
        assert isinstance(attention.kernel, CpuPaged)
        self.device, self.dtype = loaded.model.device, loaded.dtype
        self.model, self.attention, self.cache, self.reason = loaded.model, attention, cache, reason
        # An output layer of floats is torch's product, which may cut its sums by threads.
        self.thread_invariant = isinstance(self.model.head, QuantizedLinear)
        self.rope = rope_in_force(loaded.rope, attention.pattern)
        self._attention = ChainedAttention(attention.kernel, attention.ruled_layers, cache)
        # Selection keeps summaries of pages, which steps bring up to date.
        self.gives_up = not self._attention.selects
        self._chain = self.model.decoder.chain(self._attention)
        self._likely: tuple[LikelyTokens, Chain] | None = None
        if isinstance(self.model.head, QuantizedLinear):
            likely = LikelyTokens(self.model.head, self.model.norm)
            self._likely = likely, self.model.decoder.chain(self._attention, likely.call)
        self._batches = FollowingBatches()

    @staticmethod
    def obstacle(loaded: LoadedModel, attention: Attention) -> str | None:
        """Why a step can't be one native call, as part of a sentence; ``None`` if it can."""
        if not isinstance(loaded.model, QuantizedModel):
            return loaded.unpacked or "its weights are not packed"
        return ChainedAttention.obstacle(attention.kernel, attention.ruled_layers)

    def logits(self, step: StepInput) -> torch.Tensor:
        """See ``Executor.logits``."""
        hidden = self._prepare(step)
        _run(self._chain, step)
        return self.model.output(hidden, None if step.rows is None else torch.tensor([*step.rows] or [0]))

    def most_likely(self, step: StepInput) -> torch.Tensor | None:
        """See ``Executor.most_likely``."""
        if step.rows is not None or self._likely is None:
            return None
        likely, chain = self._likely
        tokens = likely.place(self._prepare(step))
        _run(chain, step)
        return tokens

    def _prepare(self, step: StepInput) -> torch.Tensor:
        """Prepares the layers; gives the embeddings ``[T, C]``, which they overwrite with their output."""
        model, batch = self.model, self._batches.batch(step)
        hidden = model.embedding(step.ids)
        with lengths_of(self.rope, step):
            angles = model.rotary.at(batch.device.positions)
        given = self._attention.given(batch)
        heads, attended = model.decoder.place(hidden, angles, given)
        self._attention.prepare(batch, given, heads.queries, heads.keys, heads.values, attended)
        return hidden


def _run(chain: Chain, step: StepInput) -> None:
    if not chain.run(step.watched):
        raise GivenUpError
