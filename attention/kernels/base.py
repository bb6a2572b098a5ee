"""How softmax(QKᵀ)V is computed over the paged cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from attention.formats import CACHE_FORMATS, format_name
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.table import chooses_at, spans_at
from attention.types import AttentionBatch, LayerCache, LayerSpec


class Kernel(ABC):
    """Computes attention of one layer for one batch. Holds no state between batches.

    Attributes:
        name: what the kernel is called in settings, logs and metrics.
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

        ``dtype`` is the cache's; queries may come in any other. Each is a sentence without its period, naming
        the kernel and the layers concerned.
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
        rerotated: torch.Tensor | None = None,
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
            rerotated: ``[T, query_heads, head_size]``, the queries as they meet the keys of the first
                ``pattern.rerotated`` tokens, where that is not as they meet all others.

        Returns:
            ``[T, query_heads, value_size]`` in the query's dtype.
        """

    def needs_host(self, pattern: Pattern) -> str | None:
        """Why a batch that the device alone knows (``AttentionBatch.on_device``) can't be computed, if so.

        Part of a sentence. Where it is ``None``, ``update`` and ``forward`` of such a batch ask nothing of
        the host, and launch the same whatever positions and pages are.
        """
        return f"kernel {self.name} plans every step on the host, as all but triton do"

    def write(self, cache: LayerCache, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """``cache.write``, or a faster way to the same; called before ``update`` and ``forward``."""
        cache.write(slots, key, value)

    def update(
        self, layer: LayerSpec, cache: LayerCache, batch: AttentionBatch, pattern: ContentPattern
    ) -> None:
        """``pattern.update``, or a faster way to the same; called before ``forward``, with the same."""
        pattern.update(layer, cache, batch)


def power_of_two(number: int) -> int:
    """The next power of two from ``number``, at least 1, on."""
    return 1 << (number - 1).bit_length()


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


def spans_within(spans: torch.Tensor, positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """What of a pattern's ranges lies in the layer's own window.

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


def spans_of(batch: AttentionBatch, pattern: Pattern, window: int | None) -> torch.Tensor:
    """What each query row of the batch may see, as ``spans_within``, on the host."""

    def find() -> torch.Tensor:
        positions = batch.host_positions
        spans = torch.from_numpy(spans_at(pattern, positions.numpy()))
        return spans_within(spans, positions, window)

    spans: torch.Tensor = batch.plan(("spans", pattern, window), find)
    return spans


def choosing_rows(batch: AttentionBatch, pattern: ContentPattern) -> torch.Tensor:
    """The query rows that see a choice only, int64 ``[N]``, ascending, on the host; others see all before."""

    def find() -> torch.Tensor:
        positions, prompt_lens = batch.host_positions.numpy(), batch.host_prompt_lens.numpy()
        return torch.from_numpy(np.flatnonzero(chooses_at(pattern, positions, prompt_lens)))

    return batch.plan(("choosing", pattern), find)


def locate(
    batch: AttentionBatch, sequences: torch.Tensor | int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tokens lie in the cache.

    Args:
        batch: the step's work.
        sequences: indices into the batch, or one for all.
        positions: token positions, of a shape that broadcasts with ``sequences``.

    Returns:
        Slots (``page * page_size + offset``, int64) and whether the page is still there (a slot whose page
        is gone must not be read), both of the broadcast shape.
    """
    pages = batch.page_table[sequences, positions // batch.page_size].long()
    return pages * batch.page_size + positions % batch.page_size, pages != 0


def format_refusal(name: str, dtype: torch.dtype) -> list[str]:
    """The reason, if a cache in ``dtype`` cannot be read by a kernel that reads all of ``CACHE_FORMATS``."""
    if dtype in CACHE_FORMATS.values():
        return []
    *most, last = CACHE_FORMATS
    return [f"{name} reads {', '.join(most)} or {last}, not {format_name(dtype)}"]


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
