"""torch's own flash attention over sequences of different lengths, ``torch.nn.attention.varlen``."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn

from attention.formats import cast
from attention.kernels.base import Kernel
from attention.kernels.cuda_packages import Lengths, gather, gathered, refusals, window_of
from attention.patterns.base import Pattern
from attention.types import AttentionBatch, LayerCache, LayerSpec

# What the implementation within torch, FlashAttention-2, can read in place.
_PAGE_MULTIPLE = 256


class _Plan(NamedTuple):
    """What all sequences see: pages of the cache if these can be read in place, else slots to gather."""

    slots: torch.Tensor | None
    lengths: Lengths


class Varlen(Kernel):
    """One call for the whole batch, mixed or not; in every torch for CUDA.

    From torch 2.12 on, pages of a multiple of 256 tokens are read in place. Others, and all with torch 2.11,
    are gathered first.
    """

    name = "varlen"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``."""
        return refusals(self.name, layers, device, dtype, pattern)

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        pattern: Pattern,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        window = window_of(layer, pattern)
        plan: _Plan = batch.plan((self.name, window), lambda: _plan(batch, window))
        lengths = plan.lengths
        features: dict[str, Any] = {"seqused_k": lengths.key_lens, "block_table": batch.page_table}
        keys, values = cache.keys, cache.values
        if plan.slots is not None:
            keys, values, features = gather(keys, plan.slots), gather(values, plan.slots), {}
        if _reads_pages():
            features["enable_gqa"] = True
        output: Any = varlen_attn(
            cast(query, keys.dtype),
            keys,
            values,
            lengths.query_starts,
            lengths.key_starts,
            lengths.longest_query,
            lengths.longest_keys,
            scale=layer.scale,
            window_size=_window_size(window, lengths),
            **features,
        )
        return output.to(query.dtype)


def _window_size(window: int | None, lengths: Lengths) -> tuple[int, int]:
    """How far a query sees to the left and to the right of itself; -1: without end."""
    if window is not None:
        return window - 1, 0
    # A last token has nothing to its right, and only without a limit is its sequence split over the GPU.
    return (-1, -1) if lengths.longest_query == 1 else (-1, 0)


def _reads_pages() -> bool:
    """Whether this torch is 2.12 or newer."""
    return "block_table" in signature(varlen_attn).parameters


def _plan(batch: AttentionBatch, window: int | None) -> _Plan:
    sequences = range(batch.size)
    if not _reads_pages() or batch.page_size % _PAGE_MULTIPLE:
        return _Plan(*gathered(batch, sequences, window))
    counts = [batch.query_len(b) for b in sequences]
    return _Plan(None, Lengths.build(counts, batch.seq_lens, batch.page_table.device))
