"""What ``topk`` remembers and chooses, in C++ where keys and summaries lie; see select.cpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from attention.cache import PagedCache
from attention.kernels.base import choosing_rows
from attention.kernels.cpu import native
from attention.kernels.cpu.calls import FORMATS
from attention.kernels.cpu.chain import NativeCall, Places, calls_of, places, table
from attention.patterns.base import Pattern
from attention.patterns.topk import TopK
from attention.types import AttentionBatch, LayerCache, LayerSpec


class Update(ctypes.Structure):
    """``Update`` in select_call.hpp. Who fills it keeps alive what its addresses point to."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "summary", "pages", "parallel")),
        *((name, ctypes.c_int64) for name in ("count", "page_size", "kv_heads", "head_size")),
        *((name, ctypes.c_int64) for name in ("format", "threads")),
    ]


class Selection(ctypes.Structure):
    """``Selection`` in select_call.hpp. Who fills it keeps alive what its addresses point to."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "summary", "page_table", "rows", "owners")),
        *((name, ctypes.c_void_p) for name in ("positions", "ranges", "parallel")),
        *((name, ctypes.c_int64) for name in ("entries", "choices", "query_heads", "kv_heads", "head_size")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "page_size", "table_width")),
        *((name, ctypes.c_int64) for name in ("sink_pages", "recent_pages", "window", "format", "threads")),
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
    """Compiles the functions if they are not there yet.

    Raises:
        NativeError: that is not possible; the message says why, as part of a sentence.
    """
    library = native.load(Path(__file__).with_name("select.cpp"), native.kept(), (Update, Selection))
    library.longspan_update.restype = library.longspan_select.restype = None
    return Compiled(library.longspan_update, library.longspan_select, *native.openmp("GOMP_parallel"))


def knows(pattern: Pattern) -> TypeGuard[TopK]:
    """Whether a pattern's choice is made here."""
    return type(pattern) is TopK  # what is derived from it may choose otherwise


def update(pattern: TopK, layer: LayerSpec, cache: LayerCache, batch: AttentionBatch) -> None:
    """See ``ContentPattern.update``."""
    assert cache.summary is not None
    assert cache.keys.is_contiguous()
    pages = pattern.completed(batch)
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
                page_size=batch.page_size,
                kv_heads=layer.kv_heads,
                head_size=layer.head_size,
                format=FORMATS[cache.keys.dtype],
                threads=torch.get_num_threads(),
            )
        )
    )


class Rows(NamedTuple):
    """Query rows that choose, and memory for what they see in a layer.

    Attributes:
        rows: int64 ``[N]``, indices of query rows of the batch.
        owners: int64 ``[N]``, their sequences.
        positions: int64 ``[N]``.
        ranges: int64 ``[N, Hkv, K, 2]``, overwritten by every layer.
    """

    rows: torch.Tensor
    owners: torch.Tensor
    positions: torch.Tensor
    ranges: torch.Tensor


def rows_of(pattern: TopK, kv_heads: int, rows: torch.Tensor, batch: AttentionBatch) -> Rows:
    """Memory for the choice of ``rows`` of the batch, the same for all layers of so many KV heads."""

    def make() -> Rows:
        width = min(pattern.choices(batch.page_size), batch.page_table.shape[1])
        ranges = torch.empty(len(rows), kv_heads, width + 2, 2, dtype=torch.long)
        # Arrays, since with so few numbers a call of torch's costs more than what it computes.
        owners, positions = (numbers.numpy()[rows.numpy()] for numbers in (batch.owners, batch.positions))
        return Rows(rows, torch.from_numpy(owners), torch.from_numpy(positions), ranges)

    # The plan holds the rows, so nothing else can get their id while the batch lives.
    made: Rows = batch.plan(("chosen", pattern, kv_heads, id(rows)), make)
    return made


def select(
    pattern: TopK,
    layer: LayerSpec,
    query: torch.Tensor,
    rows: Rows,
    cache: LayerCache,
    batch: AttentionBatch,
) -> torch.Tensor:
    """See ``ContentPattern.select``; the layer's own window is taken off already.

    Args:
        pattern: which chooses.
        layer: the layer.
        query: float32 ``[T, H, D]``, all of the batch's queries, after RoPE.
        rows: which of them choose.
        cache: the layer's keys, values and summary.
        batch: the step's work.

    Returns:
        ``rows.ranges``, filled.
    """
    assert cache.summary is not None
    assert query.dtype == torch.float32
    assert query.stride(2) == 1
    made = compiled()
    pages = batch.page_table.contiguous()
    made.select(
        ctypes.byref(
            Selection(
                query.data_ptr(),
                cache.summary.data_ptr(),
                pages.data_ptr(),
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
                batch.page_size,
                pages.shape[1],
                pattern.sink_pages,
                pattern.recent_pages,
                layer.window or 0,
                FORMATS[cache.summary.dtype],
                torch.get_num_threads(),
                0,
                layer.scale,
            )
        )
    )
    return rows.ranges


class Choosing:
    """``update`` and ``select`` of some layers as native calls that stay the same from step to step.

    Args:
        layers: which choose, with their pattern.
        cache: their keys and summaries.

    Attributes:
        calls: by layer index: what updates the summaries, when the step's keys are written, and what chooses.

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
                one["summary"], one["format"] = summary.data_ptr(), FORMATS[summary.dtype]
                one["kv_heads"], one["head_size"] = layer.kv_heads, layer.head_size
            selection["query_heads"], selection["scale"] = layer.query_heads, layer.scale
            selection["window"] = layer.window or 0
            selection["sink_pages"], selection["recent_pages"] = pattern.sink_pages, pattern.recent_pages
        # Layers of as many KV heads share memory.
        self._alike = [(*what, places(indices)) for what, indices in alike.items()]
        for rows in self._updates, self._selections:
            rows["parallel"], rows["page_size"] = made.team, cache.page_size
        updates, selections = calls_of(made.update, self._updates), calls_of(made.select, self._selections)
        self.calls: Mapping[int, Sequence[NativeCall]] = {
            layer.index: (updates[i], selections[i]) for i, (layer, _) in enumerate(layers)
        }

    def prepare(self, batch: AttentionBatch, query: torch.Tensor) -> list[tuple[Places, Rows]]:
        """Says where the next step's calls find their work.

        Args:
            batch: the step's work, whose page table is contiguous; kept alive by the caller, as in
                ``ChainedAttention.prepare``.
            query: float32 ``[T, H, D]``, after RoPE, when a layer's calls are made.

        Returns:
            Layers, as places in what the class was made of, and their rows that choose. A layer's call fills
            the ranges, and the next layer's overwrites them.
        """
        updates, selections = self._updates, self._selections
        updates["threads"] = selections["threads"] = torch.get_num_threads()
        selections["query"] = query.data_ptr()
        selections["row_stride"], selections["head_stride"] = query.stride()[:2]
        selections["page_table"] = batch.page_table.data_ptr()
        selections["table_width"] = batch.page_table.shape[1]
        found = []
        for pattern, kv_heads, alike in self._alike:
            pages = pattern.completed(batch)
            updates["pages"][alike], updates["count"][alike] = pages.data_ptr(), len(pages)
            rows = rows_of(pattern, kv_heads, choosing_rows(batch, pattern), batch)
            for name, tensor in zip(Rows._fields, rows, strict=True):
                selections[name][alike] = tensor.data_ptr()
            selections["entries"][alike] = len(rows.rows)
            selections["choices"][alike] = rows.ranges.shape[2] - 2
            found.append((alike, rows))
        return found
