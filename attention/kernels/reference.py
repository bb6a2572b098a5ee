"""Dense attention in float32, one sequence after the other: slow, complete, the oracle of other kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from attention.batch import AttentionBatch
from attention.dtypes import taken
from attention.kernels.base import Kernel, Kind, locate, visibility
from attention.patterns.base import ContentPattern, Pattern
from attention.transfer import to_device
from attention.types import LayerCache, LayerSpec

_LOGITS_BYTES = 256 << 20


class ReferencePlan(NamedTuple):
    """The step, the pattern, and which rows select by content, bool ``[T]`` on the device."""

    batch: AttentionBatch
    pattern: Pattern
    selecting: torch.Tensor


class Reference(Kernel[ReferencePlan]):
    """Computes every feature of ``LayerSpec`` by its definition.

    Query rows are taken in blocks so that no block's logits take more than 256 MiB.
    """

    name = "reference"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``; supports everything."""
        return []

    def plan(self, kind: Kind, batch: AttentionBatch) -> ReferencePlan:
        """See ``Kernel.plan``."""
        selecting = np.zeros(len(batch.host.positions), dtype=bool)
        if isinstance(kind.pattern, ContentPattern):
            selecting[batch.visible.selecting(kind.pattern)] = True
        device = batch.device.positions.device
        return ReferencePlan(batch, kind.pattern, to_device(torch.from_numpy(selecting), device))

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: ReferencePlan,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        output = query.new_empty(*query.shape[:2], layer.value_size)
        (batch, pattern, selecting), host = plan, plan.batch.host
        for b, seq_len in enumerate(host.seq_lens):
            start, stop = host.query_starts[b], host.query_starts[b + 1]
            positions = torch.arange(seq_len, device=query.device)
            slots, there = locate(batch.device, b, positions)
            positions, slots = positions[there], slots[there]
            keys = taken(cache.keys.flatten(0, 1), slots).float()
            values = taken(cache.values.flatten(0, 1), slots).float()
            # Tokens on evicted pages are behind the layer's window, but a selection counts them.
            whole = keys.new_zeros(seq_len, *keys.shape[1:])
            whole[positions] = keys
            rows = max(1, _LOGITS_BYTES // (4 * layer.query_heads * max(1, len(positions))))
            for first in range(start, stop, rows):
                last = min(first + rows, stop)
                at = batch.device.positions[first:last]
                visible = visibility(at[:, None], positions, layer.window, pattern)[:, None]
                if isinstance(pattern, ContentPattern):
                    selected = pattern.selection(layer, query[first:last], at, whole, host.page_size)
                    visible = visible & (selected[..., positions] | ~selecting[first:last, None, None])
                near = None
                if rerotated is not None:
                    near = rerotated[first:last], positions < pattern.rerotated
                output[first:last] = _attend(layer, query[first:last], keys, values, visible, sinks, near)
        return output


def _attend(
    layer: LayerSpec,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    near: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """``[R, H, Dv]``: ``query`` ``[R, H, D]`` over ``keys`` ``[L, Hkv, D]``.

    ``visible`` is ``[R, 1 or Hkv, L]``; ``near`` the queries to use instead for some of the keys, and which.
    """
    logits = _logits(layer, query, keys)
    if near is not None:
        logits = torch.where(near[1], _logits(layer, near[0], keys), logits)
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    logits = logits.masked_fill(~visible.transpose(0, 1)[:, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(layer.kv_heads, -1, 1, 1).expand(-1, -1, len(query), 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(dim=-1)[..., : len(keys)]
    return torch.einsum("kgrl,lkd->rkgd", weights, values).flatten(1, 2)


def _logits(layer: LayerSpec, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    grouped = query.float().unflatten(1, (layer.kv_heads, -1))
    return torch.einsum("rkgd,lkd->kgrl", grouped, keys) * layer.scale
