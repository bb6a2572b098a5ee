"""Layers called one after the other, transformers' own, fused or packed, with attention through the hook."""

from __future__ import annotations

import torch

from attention.backends import Attention
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.forward import forward
from attention.hook import Step
from attention.step import DeviceBatch
from attention.transfer import to_device
from server.models.executors.base import Executor, StepInput
from server.models.executors.rotary import lengths_of, rope_in_force, rotations_of
from server.models.loaded import LoadedModel


class EagerExecutor(Executor):
    """Runs any model that is called as a causal language model of transformers; see ``Executor``.

    Args:
        loaded: the model, whose attention implementation is ``longspan``.
        attention: pattern and kernel.
        cache: keys and values of all layers.
        reason: why this executor.

    Raises:
        UnsupportedError: the pattern's in-cache positions don't go with how the model rotates its keys.
    """

    name = "layer_by_layer"

    def __init__(self, loaded: LoadedModel, attention: Attention, cache: PagedCache, reason: str) -> None:
        self.model, self.attention, self.cache, self.reason = loaded.model, attention, cache, reason
        self.device, self.dtype = loaded.model.device, loaded.dtype
        self.rope = rope_in_force(loaded.rope, attention.pattern)
        self._layers = {layer.index: layer for layer in loaded.layers}
        self.rotations = rotations_of(loaded, attention.pattern)

    def logits(self, step: StepInput) -> torch.Tensor:
        """See ``Executor.logits``."""
        # Some models' heads cannot handle an empty selection of rows.
        wanted = None if step.rows is None else torch.tensor([*step.rows] or [0])
        rows = None if wanted is None else to_device(wanted, step.ids.device)
        with lengths_of(self.rope, step):
            return self.forward(step.ids, step.batch, rows)

    def forward(
        self, ids: torch.Tensor, batch: AttentionBatch | DeviceBatch, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[N, V]`` of a batch that is on the device already.

        Args:
            ids: int64 ``[T]`` on the device.
            batch: the step's attention; of a captured step its part on the device.
            rows: int64 ``[N]`` on the device; ``None`` for all tokens.
        """
        step = Step(self.attention, self.cache, batch, self._layers, self.rotations)
        return forward(self.model, ids, step.device_batch.positions, step, rows)
