"""A kernel in C++ that reads keys and values where they lie; see cpu_paged.cpp."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attention.kernels import native
from attention.kernels.base import Kernel, choosing_rows, spans_within
from attention.patterns.base import ContentPattern, Pattern
from attention.types import AttentionBatch, LayerCache, LayerSpec

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Rows whose choice is made at once, since their ranges may be many.
_CHOOSING_ROWS = 64

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "cpu_paged.cpp"
_INCLUDED = [_FOLDER / f"cpu_paged_{part}.hpp" for part in ("blocks", "lanes", "rows", "work")]


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


class _Compiled(NamedTuple):
    """The kernel, and the threads that it runs on.

    Attributes:
        attend: takes the address of a ``_Call``.
        team: the address of GOMP_parallel in the OpenMP runtime of torch itself, so that there is one pool.
    """

    attend: Any
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
        key = (self.name, layer.window, pattern)
        plan: _Plan = batch.plan(key, lambda: _plan(batch, layer.window, pattern))
        if len(plan.ruled.rows):
            _attend(layer, wide, near, cache, batch, pattern.turned, plan.ruled, weights, output)
        if isinstance(pattern, ContentPattern):
            for rows in plan.choosing:
                ranges = pattern.select(layer, query[rows], rows, cache, batch)
                ranges = spans_within(ranges, batch.positions[rows], layer.window)
                chosen = _Rows(rows, batch.owners[rows], ranges.contiguous())
                _attend(layer, wide, near, cache, batch, pattern.turned, chosen, weights, output)
        return output.to(query.dtype)


def _plan(batch: AttentionBatch, window: int | None, pattern: Pattern) -> _Plan:
    rows, choosing = torch.arange(len(batch.positions)), []
    if isinstance(pattern, ContentPattern):
        found = choosing_rows(batch, pattern)
        choosing = [part for part in found.split(_CHOOSING_ROWS) if len(part)]
        rows = rows[~torch.isin(rows, found)]
    positions = batch.positions[rows]
    ranges = spans_within(pattern.spans(positions), positions, window)
    return _Plan(_Rows(rows, batch.owners[rows], ranges[:, None].contiguous()), choosing)


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
    folder = Path(os.environ.get("LONGSPAN_CACHE_DIR", "~/.cache/longspan")).expanduser() / "kernels"
    attend = native.load(_SOURCE, _INCLUDED, folder).longspan_attend
    attend.restype = None
    return _Compiled(attend, *native.openmp("GOMP_parallel"))
