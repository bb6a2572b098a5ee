"""All layers' attention as native calls, so that a step goes through them without returning to Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from attention.kernels.cpu import select
from attention.kernels.cpu.calls import FORMATS, Call, Write, compiled
from attention.kernels.cpu.chain import NativeCall, calls_of, table
from attention.kernels.cpu.plan import Rows, planned
from attention.patterns.base import Pattern
from attention.types import AttentionBatch, LayerSpec, PagedCache


class PagedProgram:
    """See ``Program``: tables of ``Write`` and ``Call`` with a row for each layer."""

    def __init__(self, layers: Sequence[tuple[LayerSpec, Pattern]], cache: PagedCache) -> None:
        native = compiled()
        self._cache = cache  # whose memory the tables point to
        self._writes, self._calls = table(Write, len(layers)), table(Call, len(layers))
        # Layers that see the same share a plan.
        self._alike: dict[tuple[int | None, Pattern], list[int]] = {}
        for i, (layer, pattern) in enumerate(layers):
            self._alike.setdefault((layer.window, pattern), []).append(i)
            keys, values = cache.layers[layer.index][:2]
            for one in self._writes[i], self._calls[i]:
                one["keys"], one["values"] = keys.data_ptr(), values.data_ptr()
                one["format"] = FORMATS[keys.dtype]
            write, call = self._writes[i], self._calls[i]
            write["key_numbers"] = layer.kv_heads * layer.head_size
            write["value_numbers"] = layer.kv_heads * layer.value_size
            for name in ("query_heads", "kv_heads", "head_size", "value_size", "scale"):
                call[name] = getattr(layer, name)
            call["softcap"] = layer.softcap or 0.0
        self._calls["parallel"], self._calls["page_size"] = native.team, cache.page_size
        # Where rows choose by content, these are attended by calls of their own, after the choice.
        choosing = [(layer, pattern) for layer, pattern in layers if select.knows(pattern)]
        self._choosing = select.Choosing(choosing, cache) if choosing else None
        self._choosers = [i for i, (_, pattern) in enumerate(layers) if select.knows(pattern)]
        self._chosen = self._calls[self._choosers]
        writes, calls = calls_of(native.write, self._writes), calls_of(native.attend, self._calls)
        made = {layer.index: [writes[i], calls[i]] for i, (layer, _) in enumerate(layers)}
        if self._choosing is not None:
            for (layer, _), attend in zip(choosing, calls_of(native.attend, self._chosen), strict=True):
                made[layer.index] += [*self._choosing.calls[layer.index], attend]
        self.calls: Mapping[int, Sequence[NativeCall]] = made

    def prepare(
        self,
        batch: AttentionBatch,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See ``Program.prepare``."""
        for heads in key, value, output:
            assert heads.stride()[1:] == (heads.shape[2], 1)
        assert query.stride(2) == 1
        assert batch.page_table.is_contiguous()
        writes, calls = self._writes, self._calls
        writes["key"], writes["value"] = key.data_ptr(), value.data_ptr()
        writes["key_stride"], writes["value_stride"] = key.stride(0), value.stride(0)
        writes["slots"], writes["rows"] = batch.slots.data_ptr(), len(batch.slots)
        calls["query"], calls["output"] = query.data_ptr(), output.data_ptr()
        calls["row_stride"], calls["head_stride"] = query.stride()[:2]
        calls["page_table"], calls["table_width"] = batch.page_table.data_ptr(), batch.page_table.shape[1]
        calls["threads"] = torch.get_num_threads()
        for (window, pattern), alike in self._alike.items():
            self._attend(calls, alike, planned(batch, window, pattern).ruled)
        if self._choosing is not None:
            self._chosen[:] = calls[self._choosers]
            for alike, rows in self._choosing.prepare(batch, query):
                self._attend(self._chosen, alike, Rows(rows.rows, rows.owners, rows.ranges))

    @staticmethod
    def _attend(calls: np.ndarray[Any, Any], alike: list[int], rows: Rows) -> None:
        """Says which rows some of the calls attend, and what these see."""
        for name, tensor in zip(("rows", "owners", "ranges"), rows, strict=True):
            calls[name][alike] = tensor.data_ptr()
        for name, size in zip(("entries", "range_heads", "range_count"), rows.ranges.shape, strict=False):
            calls[name][alike] = size
