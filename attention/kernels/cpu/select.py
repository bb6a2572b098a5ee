"""Page summaries and selection of ``topk`` in C++, on keys and summaries in place; see select.cpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.kernels.cpu import native
from attention.kernels.cpu.calls import DTYPES
from attention.kernels.cpu.chain import NativeCall, Places, calls_of, places, table
from attention.patterns.base import Pattern
from attention.patterns.topk import TopK
from attention.patterns.written import Written
from attention.step import Array
from attention.types import LayerCache, LayerSpec


class Update(ctypes.Structure):
    """``Update`` in select_call.hpp. The caller keeps the memory behind its addresses alive."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "summary", "pages", "parallel")),
        *((name, ctypes.c_int64) for name in ("count", "page_size", "kv_heads", "head_size")),
        *((name, ctypes.c_int64) for name in ("dtype", "threads")),
    ]


class Selection(ctypes.Structure):
    """``Selection`` in select_call.hpp. The caller keeps the memory behind its addresses alive."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "summary", "page_table", "rows", "owners")),
        *((name, ctypes.c_void_p) for name in ("positions", "ranges", "parallel")),
        *((name, ctypes.c_int64) for name in ("entries", "selected", "query_heads", "kv_heads", "head_size")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "page_size", "table_width")),
        *((name, ctypes.c_int64) for name in ("sink_pages", "recent_pages", "window", "dtype", "threads")),
        ("exact", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


class Compiled(NamedTuple):
    """The functions, and the OpenMP runtime of torch itself, so that there is one pool of threads.

    Attributes:
        update: takes the address of an ``Update``.
        select: takes the address of a ``Selection``.
        team: the address of GOMP_parallel.
    """

    update: Any
    select: Any
    team: int


@functools.cache
def compiled() -> Compiled:
    """The functions, compiled if they are not there yet.

    Raises:
        NativeError: they cannot be compiled; the message says why, as part of a sentence.
    """
    library = native.load(Path(__file__).with_name("select.cpp"), native.kept(), (Update, Selection))
    library.longspan_update.restype = library.longspan_select.restype = None
    return Compiled(library.longspan_update, library.longspan_select, *native.openmp("GOMP_parallel"))


def knows(pattern: Pattern) -> TypeGuard[TopK]:
    """Whether a pattern's selection is made here."""
    return type(pattern) is TopK  # a derived class may select otherwise


def update(layer: LayerSpec, cache: LayerCache, written: Written) -> None:
    """``TopK.update`` of a step that the host knows."""
    assert cache.summary is not None
    assert cache.keys.is_contiguous()
    pages = written.pages
    if not len(pages):
        return
    made = compiled()
    made.update(
        ctypes.byref(
            Update(
                keys=cache.keys.data_ptr(),
                summary=cache.summary.data_ptr(),
                pages=pages.data_ptr(),
                parallel=made.team,
                count=len(pages),
                page_size=written.batch.page_size,
                kv_heads=layer.kv_heads,
                head_size=layer.head_size,
                dtype=DTYPES[cache.keys.dtype],
                threads=torch.get_num_threads(),
            )
        )
    )


class Rows(NamedTuple):
    """Query rows that select, and memory for the ranges that they select in a layer.

    Attributes:
        rows: int64 ``[N]``, indices of query rows of the step.
        owners: int64 ``[N]``, their sequences.
        positions: int64 ``[N]``.
        ranges: int64 ``[N, Hkv, K, 2]``, overwritten by every layer.
    """

    rows: torch.Tensor
    owners: torch.Tensor
    positions: torch.Tensor
    ranges: torch.Tensor


def rows_of(pattern: TopK, kv_heads: int, rows: Array, batch: AttentionBatch) -> Rows:
    """The rows ``rows`` of the step, with memory for their ranges in layers of so many KV heads."""
    width = min(pattern.most_selected(batch.host.page_size), batch.device.page_table.shape[1])
    ranges = torch.empty(len(rows), kv_heads, width + 2, 2, dtype=torch.long)
    # Arrays, since for so few numbers calling torch costs more than the computation.
    known = rows, batch.host.owners[rows], batch.host.positions[rows]
    at, owners, positions = map(torch.from_numpy, known)
    return Rows(at, owners, positions, ranges)


def select(
    pattern: TopK,
    layer: LayerSpec,
    query: torch.Tensor,
    rows: Rows,
    cache: LayerCache,
    page_table: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """See ``ContentPattern.select``; the ranges are cut to the layer's own window.

    Args:
        pattern: the rule of the selection.
        layer: the layer.
        query: float32 ``[T, H, D]``, all of the step's queries, after RoPE.
        rows: which of them select.
        cache: the layer's keys, values and summary.
        page_table: int32 ``[R, P]``, contiguous.
        page_size: tokens per page.

    Returns:
        ``rows.ranges``, filled.
    """
    assert cache.summary is not None
    assert query.dtype == torch.float32
    assert query.stride(2) == 1
    made = compiled()
    assert page_table.is_contiguous()
    made.select(
        ctypes.byref(
            Selection(
                query.data_ptr(),
                cache.summary.data_ptr(),
                page_table.data_ptr(),
                rows.rows.data_ptr(),
                rows.owners.data_ptr(),
                rows.positions.data_ptr(),
                rows.ranges.data_ptr(),
                made.team,
                len(rows.rows),
                rows.ranges.shape[2] - 2,
                layer.query_heads,
                layer.kv_heads,
                layer.head_size,
                query.stride(0),
                query.stride(1),
                page_size,
                page_table.shape[1],
                pattern.sink_pages,
                pattern.recent_pages,
                layer.window or 0,
                DTYPES[cache.summary.dtype],
                torch.get_num_threads(),
                0,
                layer.scale,
            )
        )
    )
    return rows.ranges


class ChainedSelection:
    """``update`` and ``select`` of some layers as native calls that stay the same from step to step.

    Args:
        layers: those that select, with their patterns.
        cache: their keys and summaries.

    Attributes:
        calls: by layer index: one that updates the summaries once the step's keys are written, one that
            selects.

    Raises:
        NativeError: as in ``compiled``.
    """

    def __init__(self, layers: Sequence[tuple[LayerSpec, TopK]], cache: PagedCache) -> None:
        made = compiled()
        alike: dict[tuple[TopK, int], list[int]] = {}
        self._updates, self._selections = table(Update, len(layers)), table(Selection, len(layers))
        for i, (layer, pattern) in enumerate(layers):
            alike.setdefault((pattern, layer.kv_heads), []).append(i)
            update, selection = self._updates[i], self._selections[i]
            keys, _, summary = cache.layers[layer.index]
            assert summary is not None
            update["keys"] = keys.data_ptr()
            for one in update, selection:
                one["summary"], one["dtype"] = summary.data_ptr(), DTYPES[summary.dtype]
                one["kv_heads"], one["head_size"] = layer.kv_heads, layer.head_size
            selection["query_heads"], selection["scale"] = layer.query_heads, layer.scale
            selection["window"] = layer.window or 0
            selection["sink_pages"], selection["recent_pages"] = pattern.sink_pages, pattern.recent_pages
        self._kept: tuple[torch.Tensor, list[tuple[Places, Rows]]] | None = None  # what the tables point to
        # Layers of as many KV heads share memory.
        self._alike = [(*kind, places(indices)) for kind, indices in alike.items()]
        for rows in self._updates, self._selections:
            rows["parallel"], rows["page_size"] = made.team, cache.page_size
        updates, selections = calls_of(made.update, self._updates), calls_of(made.select, self._selections)
        self.calls: Mapping[int, Sequence[NativeCall]] = {
            layer.index: (updates[i], selections[i]) for i, (layer, _) in enumerate(layers)
        }

    def prepare(self, batch: AttentionBatch, query: torch.Tensor) -> list[tuple[Places, Rows]]:
        """Sets the next step's rows and tensors in all calls.

        Args:
            batch: the step's batch, whose page table is contiguous. The caller keeps it alive, as in
                ``ChainedAttention.prepare``.
            query: float32 ``[T, H, D]``, after RoPE, when a layer's calls are made.

        Returns:
            For layers that share them, their places in ``layers`` and their rows that select. These are kept
            alive until the next step. A layer's call fills the ranges, and the next layer's overwrites them.
        """
        updates, selections = self._updates, self._selections
        updates["threads"] = selections["threads"] = torch.get_num_threads()
        selections["query"] = query.data_ptr()
        selections["row_stride"], selections["head_stride"] = query.stride()[:2]
        table, pages = batch.device.page_table, Written.known(batch.host, batch.device).pages
        selections["page_table"], selections["table_width"] = table.data_ptr(), table.shape[1]
        updates["pages"], updates["count"] = pages.data_ptr(), len(pages)
        found = []
        for pattern, kv_heads, alike in self._alike:
            rows = rows_of(pattern, kv_heads, batch.visible.selecting(pattern), batch)
            for name, tensor in zip(Rows._fields, rows, strict=True):
                selections[name][alike] = tensor.data_ptr()
            selections["entries"][alike] = len(rows.rows)
            selections["selected"][alike] = rows.ranges.shape[2] - 2
            found.append((alike, rows))
        self._kept = pages, found
        return found
