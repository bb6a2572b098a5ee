"""One attention layer: its spec, and its part of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from attention.dtypes import cast, put


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The properties of one attention layer of a model, as read from its first call.

    Attributes:
        index: position of the layer in the model, from 0.
        query_heads: number of query heads.
        kv_heads: number of key and value heads; divides ``query_heads``.
        head_size: size of a head of queries or keys.
        value_size: size of a value head.
        scale: factor on the logits before softmax.
        window: the model's own sliding window: key ``j`` is visible to query ``i`` only if
            ``i - j < window``. ``None`` means no window.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before masking. ``None`` means off.
        sinks: the layer has learned sink logits (one per query head), which join the softmax's
            denominator and contribute no value.
    """

    index: int
    query_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class LayerCache(NamedTuple):
    """One layer's part of the paged KV cache.

    Attributes:
        keys: ``[pages, page_size, kv_heads, head_size]``, after RoPE.
        values: ``[pages, page_size, kv_heads, value_size]``.
        summary: ``[pages, ...]``, the page summaries of a ``ContentPattern``, or ``None``.

    Page 0 is never allocated and never written; a page table that points there says "no page".
    """

    keys: torch.Tensor
    values: torch.Tensor
    summary: torch.Tensor | None = None

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores ``key`` ``[T, kv_heads, head_size]`` and ``value``, ``cast``, at ``slots`` ``[T]``."""
        for pages, numbers in ((self.keys, key), (self.values, value)):
            put(pages.view(-1, *pages.shape[2:]), slots, cast(numbers, pages.dtype))
