"""Causal attention over pages with a bias by distance added to the logits, as in T5's decoder.

Raffel et al.: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, 2020,
section 2.1. No kernel reads pages with such a bias, so keys are gathered and go through torch's SDPA.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.batch import AttentionBatch
from attention.dtypes import wider
from attention.kernels.base import locate
from attention.kernels.sdpa import gather
from attention.types import LayerCache, LayerSpec


class _Group(NamedTuple):
    """``N`` sequences of ``R`` query rows each, which read ``L`` tokens each, padding included.

    Attributes:
        rows: int64 ``[N, R]``.
        slots: int64 ``[N, L]``; a query's own where there is padding.
        distances: int64 ``[N, R, L]``, from a query back to a key; negative where it sees none.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    distances: torch.Tensor


class RelativeBias:
    """Self-attention of one step, for all layers.

    Args:
        batch: the step's batch.
    """

    def __init__(self, batch: AttentionBatch) -> None:
        host, device = batch.host, batch.device
        at = device.slots.device
        spans = list(enumerate(pairwise(host.query_starts)))
        single = [b for b, (start, stop) in spans if stop - start == 1]
        self._groups = [
            _group(batch, [b], torch.arange(start, stop, device=at)[None])
            for b, (start, stop) in spans
            if stop - start > 1
        ]
        if single:
            rows = torch.tensor([host.query_starts[b] for b in single], device=at)[:, None]
            self._groups.append(_group(batch, single, rows))
        self._table: torch.Tensor | None = None
        self._masks: list[torch.Tensor] = []

    def attend(
        self, layer: LayerSpec, query: torch.Tensor, cache: LayerCache, table: torch.Tensor
    ) -> torch.Tensor:
        """One layer's attention; the step's keys and values are in the cache.

        Args:
            layer: the layer's spec, of as many query heads as KV heads.
            query: ``[T, H, D]``.
            cache: the layer's keys and values.
            table: ``[H, N]``, the bias by distance, below ``N``.

        Returns:
            ``[T, H, Dv]`` in the query's dtype.
        """
        dtype = wider(query.dtype, cache.keys.dtype)
        if self._table is not table:
            self._table, self._masks = table, [_mask(group, table.to(dtype)) for group in self._groups]
        output = query.new_empty(*query.shape[:2], layer.value_size)
        for group, mask in zip(self._groups, self._masks, strict=True):
            attended = scaled_dot_product_attention(
                query[group.rows].to(dtype).transpose(1, 2),
                gather(cache.keys, group.slots).to(dtype).transpose(1, 2),
                gather(cache.values, group.slots).to(dtype).transpose(1, 2),
                attn_mask=mask,
                scale=layer.scale,
            )
            output[group.rows] = attended.transpose(1, 2).to(query.dtype)
        return output


def _group(batch: AttentionBatch, sequences: list[int], rows: torch.Tensor) -> _Group:
    device = batch.device
    at = rows.device
    longest = max(batch.host.seq_lens[b] for b in sequences)
    keys = torch.arange(longest, device=at).expand(len(sequences), -1)
    positions = device.positions[rows]
    real = keys <= positions[:, -1:]
    numbers = torch.tensor(sequences, device=at)[:, None]
    slots, _ = locate(device, numbers, keys.where(real, 0))
    return _Group(
        rows,
        slots.where(real, device.slots[rows[:, -1:]]),
        positions[:, :, None] - keys[:, None],
    )


def _mask(group: _Group, table: torch.Tensor) -> torch.Tensor:
    """The terms that are added to the attention logits, ``[N, H, R, L]``."""
    bias = table[:, group.distances.clamp(0, table.shape[1] - 1)]
    return bias.masked_fill(group.distances < 0, -torch.inf).transpose(0, 1)
