"""How softmax(QKᵀ)V is computed over the paged cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

import torch

from attention.batch import AttentionBatch
from attention.dtypes import CACHE_DTYPES, dtype_name
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.written import Written
from attention.step import DeviceBatch
from attention.types import LayerCache, LayerSpec

Plan = TypeVar("Plan")


class Kind(NamedTuple):
    """The properties of a layer on which a kernel's plan depends. Layers of one kind share a step's plan.

    Attributes:
        layer: the layers' spec, with ``index`` 0.
        pattern: which cached tokens a query may see.
        query_dtype: dtype of the queries.
        cache_dtype: dtype of the cache.
    """

    layer: LayerSpec
    pattern: Pattern
    query_dtype: torch.dtype
    cache_dtype: torch.dtype

    @classmethod
    def of(cls, layer: LayerSpec, pattern: Pattern, query: torch.Tensor, cache: LayerCache) -> Kind:
        """The kind of a layer that is called with these queries and this cache."""
        return cls(replace(layer, index=0), pattern, query.dtype, cache.keys.dtype)


class Kernel(ABC, Generic[Plan]):
    """Computes attention of one layer for one step. Holds no state between steps.

    ``plan`` prepares everything that depends on the step but not on queries, keys and values, once for each
    kind of layer; ``forward`` takes it.

    Attributes:
        name: of the kernel in settings, logs and metrics.
    """

    name: str

    @abstractmethod
    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """All reasons why this kernel cannot compute these layers exactly; empty when it can.

        ``dtype`` is the cache's; queries may have another. Each reason is a sentence without its period,
        naming the kernel and the layers concerned.
        """

    @abstractmethod
    def plan(self, kind: Kind, batch: AttentionBatch) -> Plan:
        """The plan of a step for layers of this kind."""

    @abstractmethod
    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: Plan,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of ``T`` query tokens, whose own keys and values are already in the cache.

        A query sees the keys that the pattern, the layer's window and causality all allow, and
        none on an evicted page.

        Args:
            layer: the layer's spec.
            query: ``[T, query_heads, head_size]``, after RoPE.
            cache: the layer's keys and values.
            plan: of the step, for layers of this kind.
            sinks: ``[query_heads]``, learned sink logits, for layers that have them.
            rerotated: ``[T, query_heads, head_size]``, the queries rerotated for the keys of the first
                ``pattern.rerotated`` tokens; ``None`` if these take the same queries as all others.

        Returns:
            ``[T, query_heads, value_size]`` in the query's dtype.
        """

    def with_rounded_products(self) -> Kernel[Plan]:
        """The same kernel, free to round queries, keys, weights and values of prompts to 16 bits.

        For models that round more than that themselves. A kernel may round so only over a cache of at most 16
        bits; one that has no faster products of fewer bits is this kernel itself.
        """
        return self

    def products(self, cache_dtype: torch.dtype) -> str | None:
        """Of what a prompt's products are over a cache of this dtype, where rounding them was allowed.

        Returns:
            For example ``16-bit integers``; ``None`` where nothing is rounded for its products.
        """
        return None

    def write(self, cache: LayerCache, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """``cache.write``, or a faster way to the same; called before ``update`` and ``forward``."""
        cache.write(slots, key, value)

    def update(self, layer: LayerSpec, cache: LayerCache, written: Written, pattern: ContentPattern) -> None:
        """``pattern.update``, or a faster way to the same; called before ``forward``, with the same."""
        pattern.update(layer, cache, written)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()


def visibility(
    queries: torch.Tensor, keys: torch.Tensor, window: int | None, pattern: Pattern
) -> torch.Tensor:
    """Which keys a layer's queries see: causality, the pattern and the layer's own window combined.

    Args:
        queries: positions, of any shape.
        keys: positions, of a shape that broadcasts with it.
        window: the layer's own sliding window, or ``None``.
        pattern: the rule in force.

    Returns:
        Booleans of the broadcast shape.
    """
    visible = (keys <= queries) & pattern.visible(queries, keys)
    if window is not None:
        visible &= queries - keys < window
    return visible


def spans_within(spans: torch.Tensor, positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """A pattern's ranges cut to the layer's own window.

    Args:
        spans: ``[N, ..., K, 2]``, see ``Pattern.spans``.
        positions: of the queries, int64 ``[N]``.
        window: the layer's own sliding window, or ``None``.

    Returns:
        Ranges of the same shape.
    """
    if window is None:
        return spans
    least = (positions - window + 1).view(-1, *[1] * (spans.ndim - 1))
    return spans.maximum(least)


def locate(
    batch: DeviceBatch, sequences: torch.Tensor | int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tokens lie in the cache.

    Args:
        batch: the step's batch.
        sequences: rows of the page table, or one for all.
        positions: token positions, of a shape that broadcasts with ``sequences``.

    Returns:
        Slots (``page * page_size + offset``, int64) and whether the page is still there (a slot whose page
        was evicted must not be read), both of the broadcast shape.
    """
    pages = batch.page_table[sequences, positions // batch.page_size].long()
    return pages * batch.page_size + positions % batch.page_size, pages != 0


def dtype_refusal(name: str, dtype: torch.dtype) -> list[str]:
    """The reason, if a cache in ``dtype`` cannot be read by a kernel that reads all of ``CACHE_DTYPES``."""
    if dtype in CACHE_DTYPES.values():
        return []
    *most, last = CACHE_DTYPES
    return [f"{name} reads {', '.join(most)} or {last}, not {dtype_name(dtype)}"]


def layer_ranges(layers: list[LayerSpec]) -> str:
    """Layers' indices as text, like ``layers 0-5, 7``."""
    runs: list[list[int]] = []
    for index in sorted(layer.index for layer in layers):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer {text}" if len(layers) == 1 else f"layers {text}"
