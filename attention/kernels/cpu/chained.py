"""All layers' attention as native calls, so that a step goes through them without returning to Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.kernels.base import Kernel, layer_ranges
from attention.kernels.cpu import select
from attention.kernels.cpu.calls import DTYPES, Call, Write, compiled
from attention.kernels.cpu.chain import NativeCall, Placed, Places, calls_of, places, same, table
from attention.kernels.cpu.paged import CpuPaged
from attention.kernels.cpu.plan import Rows, ruled
from attention.patterns.base import ContentPattern, Pattern
from attention.step import Array
from attention.types import LayerSpec


class ChainedAttention:
    """Writes to the cache and attention of all layers, as calls that stay the same from step to step.

    Tables of ``Write`` and ``Call`` with a row for each layer.

    Args:
        kernel: the chosen kernel.
        layers: each with its pattern; ``obstacle`` must be ``None`` for them.
        cache: where their keys and values go.

    Attributes:
        calls: by layer index: these write the step's keys and values to the cache and compute attention.
    """

    def __init__(
        self, kernel: CpuPaged, layers: Sequence[tuple[LayerSpec, Pattern]], cache: PagedCache
    ) -> None:
        native = compiled()
        self._cache = cache  # whose memory the tables point to
        self._writes, self._calls = table(Write, len(layers)), table(Call, len(layers))
        alike: dict[tuple[int | None, Pattern], list[int]] = {}
        for i, (layer, pattern) in enumerate(layers):
            alike.setdefault((layer.window, pattern), []).append(i)
            keys, values = cache.layers[layer.index][:2]
            for one in self._writes[i], self._calls[i]:
                one["keys"], one["values"] = keys.data_ptr(), values.data_ptr()
                one["dtype"] = DTYPES[keys.dtype]
            write, call = self._writes[i], self._calls[i]
            write["key_numbers"] = layer.kv_heads * layer.head_size
            write["value_numbers"] = layer.kv_heads * layer.value_size
            for name in ("query_heads", "kv_heads", "head_size", "value_size", "scale"):
                call[name] = getattr(layer, name)
            call["softcap"] = layer.softcap or 0.0
            call["pairs"] = kernel.multiplies_pairs(keys.dtype)
        # Layers with the same pattern and window share a plan.
        self._alike = [(*kind, places(indices)) for kind, indices in alike.items()]
        self._calls["parallel"], self._calls["page_size"] = native.team, cache.page_size
        self._placed: Placed = ((), 0)
        self._batch_placed: Placed = ((), 0)
        self._given = np.empty(0, dtype=bool)
        self._kept: tuple[AttentionBatch, list[Rows]] | None = None  # what the tables point to
        # Rows that select by content are attended by separate calls, after the selection.
        selecting = [(layer, pattern) for layer, pattern in layers if select.knows(pattern)]
        self._selection = select.ChainedSelection(selecting, cache) if selecting else None
        self._selecting = [i for i, (_, pattern) in enumerate(layers) if select.knows(pattern)]
        self._selecting_calls = self._calls[self._selecting]
        writes, calls = calls_of(native.write, self._writes), calls_of(native.attend, self._calls)
        made = {layer.index: [writes[i], calls[i]] for i, (layer, _) in enumerate(layers)}
        if self._selection is not None:
            attends = calls_of(native.attend, self._selecting_calls)
            for (layer, _), attend in zip(selecting, attends, strict=True):
                made[layer.index] += [*self._selection.calls[layer.index], attend]
        self.calls: Mapping[int, Sequence[NativeCall]] = made

    @property
    def selects(self) -> bool:
        """Whether some layer selects by content, with what it keeps of the keys besides these."""
        return self._selection is not None

    @staticmethod
    def obstacle(kernel: Kernel[Any], layers: Sequence[tuple[LayerSpec, Pattern]]) -> str | None:
        """Why attention of these layers can't be chained, part of a sentence; ``None`` if it can.

        Args:
            kernel: the chosen kernel.
            layers: each with its pattern.
        """
        if not isinstance(kernel, CpuPaged):
            return f"kernel {kernel.name} is not native code for the CPU"
        for layer, pattern in layers:
            if layer.sinks:
                return f"{layer_ranges([layer])} has learned sinks"
            if pattern.rerotated:
                return f"{pattern.name} rerotates keys"
            if isinstance(pattern, ContentPattern) and not select.knows(pattern):
                return f"{pattern.name} selects keys in torch"
        return None

    def prepare(
        self,
        batch: AttentionBatch,
        given: Array,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Sets the next step's rows and tensors in all calls; every layer's rows lie in the same place.

        Args:
            batch: the step's batch; the caller keeps it and the tensors alive until the calls are made.
            given: what the method of that name gave for the batch.
            query: float32 ``[T, H, D]``, after RoPE, when a layer's calls are made.
            key: float32 ``[T, Hkv, D]``, after RoPE.
            value: float32 ``[T, Hkv, Dv]``.
            output: float32 ``[T, H, Dv]``, contiguous, to be filled.
        """
        self._place(query, key, value, output)
        self._place_batch(batch, given)
        advanced = self._kept is not None and self._kept[0] is batch
        before = self._kept[1] if self._kept is not None and advanced else [None] * len(self._alike)
        by_rule = [
            ruled(batch.visible, window, pattern, rows)
            for (window, pattern, _), rows in zip(self._alike, before, strict=True)
        ]
        self._kept = batch, by_rule
        for (*_, alike), rows, old in zip(self._alike, by_rule, before, strict=True):
            if rows is not old:
                _attend(self._calls, alike, rows)
        if self._selection is not None:
            self._selecting_calls[:] = self._calls[self._selecting]
            for alike, own in self._selection.prepare(batch, query):
                _attend(self._selecting_calls, alike, Rows(own.rows, own.owners, own.ranges))

    def given(self, batch: AttentionBatch) -> Array:
        """Which query rows belong to a prompt, bool ``[T]``, in the memory that the calls read."""
        host = batch.host
        if len(self._given) != len(host.positions):
            self._given = np.empty(len(host.positions), dtype=bool)
        np.less(host.positions, host.row_prompt_lens, out=self._given)
        return self._given

    def _place_batch(self, batch: AttentionBatch, given: Array) -> None:
        """Sets where the batch lies, and how many threads compute, likewise."""
        pages, slots = batch.device.page_table, batch.device.slots
        placed = (pages, slots, given), torch.get_num_threads()
        if same(placed, self._batch_placed):
            return
        assert pages.is_contiguous()
        self._batch_placed = placed
        writes, calls = self._writes, self._calls
        calls["page_table"], calls["table_width"] = pages.data_ptr(), pages.shape[1]
        writes["slots"], writes["rows"] = slots.data_ptr(), len(given)
        calls["given"], calls["threads"] = given.ctypes.data, placed[1]

    def _place(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Sets where rows lie, if that has changed since the step before."""
        placed = (query, key, value, output), 0
        if same(placed, self._placed):
            return
        for heads in key, value, output:
            assert heads.stride()[1:] == (heads.shape[2], 1)
        assert query.stride(2) == 1
        self._placed = placed
        writes, calls = self._writes, self._calls
        calls["query"], calls["output"] = query.data_ptr(), output.data_ptr()
        writes["key"], writes["value"] = key.data_ptr(), value.data_ptr()
        writes["key_stride"], writes["value_stride"] = key.stride(0), value.stride(0)
        calls["row_stride"], calls["head_stride"] = query.stride()[:2]


def _attend(calls: np.ndarray[Any, Any], alike: Places, rows: Rows) -> None:
    """Sets the rows that some of the calls attend, and the ranges that they see."""
    for name, tensor in zip(("rows", "owners", "ranges"), rows, strict=True):
        calls[name][alike] = tensor.data_ptr()
    for name, size in zip(("entries", "range_heads", "range_count"), rows.ranges.shape, strict=False):
        calls[name][alike] = size
