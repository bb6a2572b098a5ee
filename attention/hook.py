"""The one function that transformers calls for attention, and what it is given.

A model whose attention implementation is ``longspan`` calls the function with whatever object the caller
gave ``attention.forward``, or as ``model(..., longspan=...)``: a ``Step`` when it serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attention.backends import Attention, UnsupportedError
from attention.cache import PagedCache
from attention.forward import Attend, attending
from attention.layers import IMPLEMENTATION
from attention.rotation import Rotation
from attention.types import AttentionBatch, LayerSpec


@dataclass(frozen=True, slots=True)
class Step:
    """One forward over the paged cache.

    Attributes:
        attention: pattern and kernel.
        cache: keys and values of all layers; the step's own are written as layers run.
        batch: the step's work.
        layers: by index, as ``read_layers`` found them.
        rotations: by index, as ``read_rotations`` found them; needed where the pattern rerotates queries.
    """

    attention: Attention
    cache: PagedCache
    batch: AttentionBatch
    layers: Mapping[int, LayerSpec]
    rotations: Mapping[int, Rotation] = field(default_factory=dict)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        features: Mapping[str, Any],
    ) -> torch.Tensor:
        """See ``Attend.attend``.

        Raises:
            UnsupportedError: the model insists on a mask, which the paged cache cannot apply.
        """
        if mask is not None:
            raise UnsupportedError(
                "the model gives its attention a mask of its own; call it without attention_mask"
            )
        layer = self.layers[module.layer_idx]
        cache = self.cache.layers[layer.index]
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        self.attention.write(cache, self.batch.slots, keys, values)
        rows = query[0].transpose(0, 1)
        output = self.attention.forward(
            layer, rows, cache, self.batch, features.get("s_aux"), self._rerotated(layer, rows)
        )
        return output[None]

    def _rerotated(self, layer: LayerSpec, query: torch.Tensor) -> torch.Tensor | None:
        """The queries ``[T, H, D]`` as they meet the pattern's first tokens; ``None`` if as any other."""
        pattern = self.attention.pattern_of(layer)
        if not pattern.rerotated:
            return None
        rotation, batch = self.rotations[layer.index], self.batch

        def angles() -> tuple[torch.Tensor, torch.Tensor] | None:
            # The last query's rerotation is the largest; asked on the host, so that no device has to be
            # waited for.
            if not batch.device_only and not pattern.rerotation(torch.tensor(batch.seq_lens) - 1).any():
                return None
            return rotation.angles(-pattern.rerotation(batch.positions))

        back = batch.plan(("rerotated", pattern, rotation), angles)
        return None if back is None else rotation.rotate_by(query, back)


def register() -> None:
    """Makes ``longspan`` an attention implementation of transformers; may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    longspan: Attend | None = None,
    **features: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls; returns ``[1, T, H, Dv]`` and no weights."""
    longspan = attending() if longspan is None else longspan
    if longspan is None:
        raise UnsupportedError(
            f"{type(module).__name__} was called without the keyword argument longspan: call the model by "
            "attention.forward.forward"
        )
    return longspan.attend(module, query, key, value, attention_mask, features), None
