"""The paged KV cache of all layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attention.dtypes import put, taken
from attention.patterns.base import ContentPattern, Pattern
from attention.transfer import to_device
from attention.types import LayerCache, LayerSpec


class PagedCache:
    """Keys and values of all layers, in pages of ``page_size`` tokens.

    Args:
        layers: the model's attention layers.
        pages: number of pages, page 0 included.
        page_size: tokens per page.
        dtype: dtype of keys and values.
        device: where they live.
        pattern: whose page summaries to keep; its dense layers have none.
        poison: fill with NaN, so that reading unwritten memory shows in the results (for tests).
    """

    def __init__(
        self,
        layers: list[LayerSpec],
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        pattern: Pattern | None = None,
        poison: bool = False,
    ) -> None:
        self.page_size = page_size
        self.pages = pages
        self.dtype = dtype
        self.layers: dict[int, LayerCache] = {}
        # GPU kernels also read unwritten memory and multiply it by zero: it must be finite.
        blank = torch.empty if torch.device(device).type == "cpu" else torch.zeros
        for layer in layers:
            shape = (pages, page_size, layer.kv_heads)
            keys = blank(*shape, layer.head_size, dtype=dtype, device=device)
            values = blank(*shape, layer.value_size, dtype=dtype, device=device)
            summary = None
            if form := _summary(layer, page_size, dtype, pattern):
                summary = torch.zeros(pages, *form[0], dtype=form[1], device=device)
            if poison:
                for tensor in (keys, values, summary):
                    if tensor is not None:
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 0x55)
            self.layers[layer.index] = LayerCache(keys, values, summary)
        # For a few pages torch's indexing takes ten times as long as numpy's.
        host = torch.device(device).type == "cpu"
        self._on_host = [pages.view(torch.uint8).numpy() for pages in self._tensors()] if host else []

    def copy(self, copies: Mapping[int, int]) -> None:
        """Queues copies of pages: keys, values and page summaries of all layers.

        Args:
            copies: the page to copy from, by the page to copy to; one after the other.
        """
        if self._on_host:
            for whole in self._on_host:
                for to, origin in copies.items():
                    whole[to] = whole[origin]
        elif copies:
            tensors = self._tensors()
            # All are read before any is written: where one reads what an earlier one wrote, it reads the
            # origin of that.
            origins: dict[int, int] = {}
            for to_page, origin_page in copies.items():
                origins[to_page] = origins.get(origin_page, origin_page)
            pages = torch.tensor([[*origins], [*origins.values()]])
            to, origin = to_device(pages, tensors[0].device)
            for tensor in tensors:
                put(tensor, to, taken(tensor, origin))

    def _tensors(self) -> list[torch.Tensor]:
        return [pages for layer in self.layers.values() for pages in layer if pages is not None]

    @staticmethod
    def bytes_per_page(
        layers: list[LayerSpec], page_size: int, dtype: torch.dtype, pattern: Pattern | None = None
    ) -> int:
        """Bytes that one page takes over all ``layers``, the page summaries included."""
        numbers = sum(layer.kv_heads * (layer.head_size + layer.value_size) for layer in layers)
        forms = [_summary(layer, page_size, dtype, pattern) for layer in layers]
        summaries = sum(form[0].numel() * form[1].itemsize for form in forms if form)
        return numbers * page_size * dtype.itemsize + summaries


def _summary(
    layer: LayerSpec, page_size: int, dtype: torch.dtype, pattern: Pattern | None
) -> tuple[torch.Size, torch.dtype] | None:
    if not isinstance(pattern, ContentPattern) or layer.index in pattern.dense_layers:
        return None
    return pattern.summary_of(layer, page_size, dtype)
