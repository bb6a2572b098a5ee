"""How softmax(QKᵀ)V is computed over the paged cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from attention.patterns.base import Pattern
from attention.types import AttentionBatch, LayerCache, LayerSpec


class Kernel(ABC):
    """Computes attention of one layer for one batch. Holds no state between batches.

    Attributes:
        name: what the kernel is called in settings, logs and metrics.
    """

    name: str

    @abstractmethod
    def unsupported(
        self, layers: list[LayerSpec], device: torch.device, dtype: torch.dtype, page_size: int
    ) -> list[str]:
        """All reasons why this kernel cannot compute these layers exactly; empty when it can.

        Each is a sentence without its period, naming the kernel and the layers concerned.
        """

    @abstractmethod
    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        pattern: Pattern,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of ``T`` query tokens, whose own keys and values are in the cache already.

        A query sees the keys that the pattern, the layer's window and causality all let it see, and
        none on a page that the page table says is gone.

        Args:
            layer: what the layer asks for.
            query: ``[T, query_heads, head_size]``, after RoPE.
            cache: the layer's keys and values.
            batch: the step's work; plans that layers can share are kept in it.
            pattern: which cached tokens a query may see.
            sinks: ``[query_heads]``, learned sink logits, for layers that have them.

        Returns:
            ``[T, query_heads, value_size]`` in the query's number format.
        """


def visibility(
    queries: torch.Tensor, keys: torch.Tensor, window: int | None, pattern: Pattern
) -> torch.Tensor:
    """Which keys a layer's queries see: causality, the pattern and the layer's own window together.

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


def locate(
    batch: AttentionBatch, sequences: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tokens lie in the cache.

    Args:
        batch: the step's work.
        sequences: indices into the batch.
        positions: token positions, of a shape that broadcasts with ``sequences``.

    Returns:
        Slots (``page * page_size + offset``, int64) and whether the page is still there (a slot whose page
        is gone must not be read), both of the broadcast shape.
    """
    pages = batch.page_table[sequences, positions // batch.page_size].long()
    return pages * batch.page_size + positions % batch.page_size, pages != 0


def layer_ranges(layers: list[LayerSpec]) -> str:
    """``layers 0-5, 7`` for people."""
    runs: list[list[int]] = []
    for index in sorted(layer.index for layer in layers):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer {text}" if len(layers) == 1 else f"layers {text}"
