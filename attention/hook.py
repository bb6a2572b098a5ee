"""The one function that transformers calls for attention, and the step that it computes.

A model whose attention implementation is ``longspan`` calls the function with the object that the caller
passed to ``attention.forward`` or as ``model(..., longspan=...)``. In serving this is a ``Step``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attention.backends import Attention, UnsupportedError
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.forward import Attend, LayerCall, attending
from attention.kernels.step_plans import StepPlans
from attention.layers import IMPLEMENTATION
from attention.patterns.base import Pattern
from attention.rotation import Rotation
from attention.step import Array, DeviceBatch
from attention.types import LayerSpec

Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward over the paged cache.

    Attributes:
        attention: pattern and kernel.
        cache: keys and values of all layers; the step's own are written as layers run.
        batch: the step's batch; of a captured step only the device's part.
        layers: by index, as ``read_layers`` found them.
        rotations: by index, as ``read_rotations`` found them; needed where the pattern rerotates queries.
    """

    attention: Attention
    cache: PagedCache
    batch: AttentionBatch | DeviceBatch
    layers: Mapping[int, LayerSpec]
    rotations: Mapping[int, Rotation] = field(default_factory=dict)
    _plans: StepPlans[Any] = field(init=False, repr=False, compare=False)
    _angles: dict[tuple[Pattern, Rotation], Angles | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_plans", self.attention.plans(self.batch))
        object.__setattr__(self, "_angles", {})

    @property
    def device_batch(self) -> DeviceBatch:
        """The device's part of the step."""
        return self.batch.device if isinstance(self.batch, AttentionBatch) else self.batch

    @property
    def given(self) -> Array | None:
        """Which rows belong to a prompt, bool ``[T]``; ``None`` where only the device knows."""
        if not isinstance(self.batch, AttentionBatch):
            return None
        return self.batch.host.positions < self.batch.host.row_prompt_lens

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``Attend.attend``.

        Raises:
            UnsupportedError: the model insists on a mask, which the paged cache cannot apply.
        """
        module, query, key, value, mask, features = call
        if mask is not None:
            raise UnsupportedError(
                "the model gives its attention a mask of its own; call it without attention_mask"
            )
        layer = self.layers[module.layer_idx]
        cache = self.cache.layers[layer.index]
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        self.attention.write(cache, self.device_batch.slots, keys, values)
        rows = query[0].transpose(0, 1)
        output = self.attention.forward(
            layer, rows, cache, self._plans, features.get("s_aux"), self._rerotated(layer, rows)
        )
        return output[None]

    def _rerotated(self, layer: LayerSpec, query: torch.Tensor) -> torch.Tensor | None:
        """The rerotated queries ``[T, H, D]``, for the pattern's first tokens; ``None`` if none is."""
        pattern = self.attention.pattern_of(layer)
        if not pattern.rerotated:
            return None
        rotation = self.rotations[layer.index]
        key = pattern, rotation
        if key not in self._angles:
            self._angles[key] = self._angles_of(pattern, rotation)
        back = self._angles[key]
        return None if back is None else rotation.rotate_by(query, back)

    def _angles_of(self, pattern: Pattern, rotation: Rotation) -> Angles | None:
        """By how much queries are rerotated; ``None`` if none is, as far as the host knows."""
        if isinstance(self.batch, AttentionBatch):
            # The last query's rerotation is the largest. Computed on the host, which so need not wait for the
            # device.
            last = torch.tensor(self.batch.host.seq_lens) - 1
            if not pattern.rerotation(last).any():
                return None
        return rotation.angles(-pattern.rerotation(self.device_batch.positions))


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
    """The function that transformers calls; returns ``[1, T, H, Dv]`` and no weights."""
    longspan = attending() if longspan is None else longspan
    if longspan is None:
        raise UnsupportedError(
            f"{type(module).__name__} was called without the keyword argument longspan: call the model by "
            "attention.forward.forward"
        )
    return longspan.attend(LayerCall(module, query, key, value, attention_mask, features)), None
