"""A kernel in C++ that reads keys and values where they lie; see cpu_paged.cpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from attention.kernels import cpu_select, native
from attention.kernels.base import Kernel, choosing_rows, spans_of, spans_within
from attention.kernels.chain import NativeCall, Program, calls_of, table
from attention.patterns.base import ContentPattern, Pattern
from attention.types import AttentionBatch, LayerCache, LayerSpec, PagedCache

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Rows whose choice is made at once, since their ranges may be many.
_CHOOSING_ROWS = 64

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "cpu_paged.cpp"
_PARTS = ("ahead", "blocks", "heads", "lanes", "panels", "rows", "work", "write")
_INCLUDED = [*(_FOLDER / f"cpu_paged_{part}.hpp" for part in _PARTS), _FOLDER / "cpu_threads.hpp"]


class _Call(ctypes.Structure):
    """``Call`` in cpu_paged_work.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "turned", "keys", "values", "page_table")),
        *((name, ctypes.c_void_p) for name in ("rows", "owners", "ranges", "sinks", "output", "parallel")),
        *((name, ctypes.c_int64) for name in ("entries", "range_heads", "range_count")),
        *((name, ctypes.c_int64) for name in ("query_heads", "kv_heads", "head_size", "value_size")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "page_size", "table_width")),
        *((name, ctypes.c_int64) for name in ("near", "format", "threads")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    ]


class _Write(ctypes.Structure):
    """``Write`` in cpu_paged_write.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("key", "value", "keys", "values", "slots")),
        *((name, ctypes.c_int64) for name in ("rows", "key_stride", "value_stride")),
        *((name, ctypes.c_int64) for name in ("key_numbers", "value_numbers", "format")),
    ]


class _Compiled(NamedTuple):
    """The kernel, and the threads that it runs on.

    Attributes:
        attend: takes the address of a ``_Call``.
        write: takes the address of a ``_Write``.
        team: the address of GOMP_parallel in the OpenMP runtime of torch itself, so that there is one pool.
    """

    attend: Any
    write: Any
    team: int


class _Rows(NamedTuple):
    """Query rows and what they see."""

    rows: torch.Tensor  # [N] of the batch's query rows, ascending
    owners: torch.Tensor  # [N]
    ranges: torch.Tensor  # [N, 1 or Hkv, K, 2]


class _Plan(NamedTuple):
    """What the layers of a step share."""

    ruled: _Rows  # what the rule over positions is enough for
    choosing: list[torch.Tensor]  # the rows that choose by content, in parts


class CpuPaged(Kernel):
    """Computes every feature of ``LayerSpec`` under any pattern, on the CPU, in float32 inside.

    Compiled for the machine when first chosen. A row's result does not depend on the rest of the batch, to
    the last bit where it is the only one of its sequence.
    """

    name = "cpu_paged"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``; compiles the kernel if nothing else speaks against it."""
        reasons = []
        if device.type != "cpu":
            reasons.append(f"cpu_paged computes on the CPU, not on {device.type}")
        if dtype not in _FORMATS:
            reasons.append(f"cpu_paged reads float32, bfloat16 or float16, not {str(dtype)[6:]}")
        if not reasons:
            try:
                _compiled()
                if cpu_select.knows(pattern):
                    cpu_select.compiled()
            except native.NativeError as error:
                reasons.append(f"cpu_paged cannot be compiled here: {error}")
        return reasons

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        pattern: Pattern,
        sinks: torch.Tensor | None,
        turned: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        wide = query.float()
        near = turned.float() if turned is not None and pattern.turned else None
        if wide.stride(-1) != 1 or (near is not None and near.stride() != wide.stride()):
            wide, near = wide.contiguous(), None if near is None else near.contiguous()
        output = wide.new_empty(len(query), layer.query_heads, layer.value_size)
        weights = None if sinks is None else sinks.float().contiguous()
        plan = _planned(batch, layer.window, pattern)
        if len(plan.ruled.rows):
            _attend(layer, wide, near, cache, batch, pattern.turned, plan.ruled, weights, output)
        if isinstance(pattern, ContentPattern):
            for rows in plan.choosing:
                chosen = _chosen(layer, query, wide, rows, cache, batch, pattern)
                _attend(layer, wide, near, cache, batch, pattern.turned, chosen, weights, output)
        return output.to(query.dtype)

    def update(
        self, layer: LayerSpec, cache: LayerCache, batch: AttentionBatch, pattern: ContentPattern
    ) -> None:
        """See ``Kernel.update``; in C++ where ``cpu_select`` knows the pattern."""
        if cpu_select.knows(pattern):
            cpu_select.update(pattern, layer, cache, batch)
        else:
            pattern.update(layer, cache, batch)

    def program(self, layers: Sequence[tuple[LayerSpec, Pattern]], cache: PagedCache) -> Program | None:
        """See ``Kernel.program``; where no layer has sinks, and choices by content are ``cpu_select``'s."""
        for layer, pattern in layers:
            chosen_in_torch = isinstance(pattern, ContentPattern) and not cpu_select.knows(pattern)
            if layer.sinks or pattern.turned or chosen_in_torch:
                return None
        return _Program(layers, cache)


class _Program:
    """See ``Program``: tables of ``_Write`` and ``_Call`` with a row for each layer."""

    def __init__(self, layers: Sequence[tuple[LayerSpec, Pattern]], cache: PagedCache) -> None:
        compiled = _compiled()
        self._cache = cache  # whose memory the tables point to
        self._writes, self._calls = table(_Write, len(layers)), table(_Call, len(layers))
        # Layers that see the same share a plan.
        self._alike: dict[tuple[int | None, Pattern], list[int]] = {}
        for i, (layer, pattern) in enumerate(layers):
            self._alike.setdefault((layer.window, pattern), []).append(i)
            keys, values = cache.layers[layer.index][:2]
            for one in self._writes[i], self._calls[i]:
                one["keys"], one["values"] = keys.data_ptr(), values.data_ptr()
                one["format"] = _FORMATS[keys.dtype]
            write, call = self._writes[i], self._calls[i]
            write["key_numbers"] = layer.kv_heads * layer.head_size
            write["value_numbers"] = layer.kv_heads * layer.value_size
            for name in ("query_heads", "kv_heads", "head_size", "value_size", "scale"):
                call[name] = getattr(layer, name)
            call["softcap"] = layer.softcap or 0.0
        self._calls["parallel"], self._calls["page_size"] = compiled.team, cache.page_size
        # Where rows choose by content, these are attended by calls of their own, after the choice.
        choosing = [(layer, pattern) for layer, pattern in layers if cpu_select.knows(pattern)]
        self._choosing = cpu_select.Choosing(choosing, cache) if choosing else None
        self._choosers = [i for i, (_, pattern) in enumerate(layers) if cpu_select.knows(pattern)]
        self._chosen = self._calls[self._choosers]
        writes, calls = calls_of(compiled.write, self._writes), calls_of(compiled.attend, self._calls)
        made = {layer.index: [writes[i], calls[i]] for i, (layer, _) in enumerate(layers)}
        if self._choosing is not None:
            for (layer, _), attend in zip(choosing, calls_of(compiled.attend, self._chosen), strict=True):
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
            self._attend(calls, alike, _planned(batch, window, pattern).ruled)
        if self._choosing is not None:
            self._chosen[:] = calls[self._choosers]
            for alike, rows in self._choosing.prepare(batch, query):
                self._attend(self._chosen, alike, _Rows(rows.rows, rows.owners, rows.ranges))

    @staticmethod
    def _attend(calls: np.ndarray[Any, Any], alike: list[int], rows: _Rows) -> None:
        """Says which rows some of the calls attend, and what these see."""
        for name, tensor in zip(("rows", "owners", "ranges"), rows, strict=True):
            calls[name][alike] = tensor.data_ptr()
        for name, size in zip(("entries", "range_heads", "range_count"), rows.ranges.shape, strict=False):
            calls[name][alike] = size


def _planned(batch: AttentionBatch, window: int | None, pattern: Pattern) -> _Plan:
    plan: _Plan = batch.plan((CpuPaged.name, window, pattern), lambda: _plan(batch, window, pattern))
    return plan


def _plan(batch: AttentionBatch, window: int | None, pattern: Pattern) -> _Plan:
    rows, owners, ranges = torch.arange(len(batch.positions)), batch.owners, spans_of(batch, pattern, window)
    choosing = []
    if isinstance(pattern, ContentPattern):
        found = choosing_rows(batch, pattern)
        choosing = [part for part in found.split(_CHOOSING_ROWS) if len(part)]
        rows = rows[~torch.isin(rows, found)]
        owners, ranges = owners[rows], ranges[rows]
    return _Plan(_Rows(rows, owners, ranges[:, None].contiguous()), choosing)


def _chosen(
    layer: LayerSpec,
    query: torch.Tensor,
    wide: torch.Tensor,
    rows: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    pattern: ContentPattern,
) -> _Rows:
    """What ``rows`` choose: in C++ where ``cpu_select`` knows the pattern, else in torch."""
    if cpu_select.knows(pattern):
        kept = cpu_select.rows_of(pattern, layer.kv_heads, rows, batch)
        return _Rows(kept.rows, kept.owners, cpu_select.select(pattern, layer, wide, kept, cache, batch))
    ranges = pattern.select(layer, query[rows], rows, cache, batch)
    ranges = spans_within(ranges, batch.positions[rows], layer.window)
    return _Rows(rows, batch.owners[rows], ranges.contiguous())


def _attend(
    layer: LayerSpec,
    query: torch.Tensor,
    turned: torch.Tensor | None,
    cache: LayerCache,
    batch: AttentionBatch,
    near: int,
    rows: _Rows,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Fills ``output`` ``[T, H, Dv]`` at ``rows``; as in ``Kernel.forward``, floats but for the cache."""
    table = batch.page_table.contiguous()
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    compiled = _compiled()
    compiled.attend(
        ctypes.byref(
            _Call(
                query.data_ptr(),
                None if turned is None else turned.data_ptr(),
                cache.keys.data_ptr(),
                cache.values.data_ptr(),
                table.data_ptr(),
                rows.rows.data_ptr(),
                rows.owners.data_ptr(),
                rows.ranges.data_ptr(),
                None if sinks is None else sinks.data_ptr(),
                output.data_ptr(),
                compiled.team,
                *rows.ranges.shape[:3],
                layer.query_heads,
                layer.kv_heads,
                layer.head_size,
                layer.value_size,
                query.stride(0),
                query.stride(1),
                batch.page_size,
                table.shape[1],
                near,
                _FORMATS[cache.keys.dtype],
                torch.get_num_threads(),
                layer.scale,
                layer.softcap or 0.0,
            )
        )
    )


@functools.cache
def _compiled() -> _Compiled:
    library = native.load(_SOURCE, _INCLUDED, native.kept())
    library.longspan_attend.restype = library.longspan_write.restype = None
    return _Compiled(library.longspan_attend, library.longspan_write, *native.openmp("GOMP_parallel"))
