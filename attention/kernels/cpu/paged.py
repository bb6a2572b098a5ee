"""A kernel in C++ that reads keys and values in place; see paged.cpp."""

from __future__ import annotations

import copy
import ctypes
from typing import NamedTuple

import torch

from attention.batch import AttentionBatch
from attention.kernels.base import Kernel, Kind, dtype_refusal, spans_within
from attention.kernels.cpu import levels, native, select
from attention.kernels.cpu.calls import DTYPES, Call, compiled
from attention.kernels.cpu.plan import Rows, given, ruled, selecting
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.blocks import KnownRows
from attention.patterns.topk import TopK
from attention.patterns.written import Written
from attention.types import LayerCache, LayerSpec


class NativePart(NamedTuple):
    """Rows whose selection is made in C++, with memory for it."""

    pattern: TopK
    rows: select.Rows


class TorchPart(NamedTuple):
    """Rows whose selection is made in torch."""

    pattern: ContentPattern
    rows: KnownRows


class PagedPlan(NamedTuple):
    """A step in layers of a kind.

    Attributes:
        rerotated: see ``Pattern.rerotated``.
        page_size: tokens per page.
        page_table: int32 ``[R, P]``, contiguous.
        pairs: whether blocks of rows are multiplied in 16-bit integers, or by a matrix unit in bfloat16.
        given: which rows belong to a prompt, bool ``[T]``.
        ruled: rows whose ranges follow from a rule over positions.
        selecting: the others, whose ranges each layer selects.
    """

    rerotated: int
    page_size: int
    page_table: torch.Tensor
    pairs: bool
    given: torch.Tensor
    ruled: Rows
    selecting: list[NativePart] | list[TorchPart]


class CpuPaged(Kernel[PagedPlan]):
    """Computes every feature of ``LayerSpec`` under any pattern, on the CPU, in float32 inside.

    With ``rounds_products`` and over a cache of at most 16 bits, several rows of a sequence, and all rows of
    a prompt, are multiplied in 16-bit integers, on processors that have these products (see paged_pairs.hpp),
    or in bfloat16, on those with a matrix unit (see paged_matrix.hpp).

    Compiled for the machine at its first use. To the last bit, a row's result does not depend on other
    sequences, nor, for a row of the prompt, on how the prompt is cut into steps. Rows after the prompt are
    computed one at a time, in another order of sums; if several are computed at once, as after preemption,
    their last bits may differ.

    Args:
        rounds_products: queries, keys, weights and values may be rounded to 16 bits for their products.
    """

    name = "cpu_paged"

    def __init__(self, rounds_products: bool = False) -> None:
        self._rounds_products = rounds_products

    def with_rounded_products(self) -> CpuPaged:
        """See ``Kernel.with_rounded_products``."""
        rounding = copy.copy(self)  # also of a derived class
        rounding._rounds_products = True
        return rounding

    def multiplies_pairs(self, cache_dtype: torch.dtype) -> bool:
        """Whether blocks of rows are multiplied in numbers of 16 bits over a cache of this dtype."""
        return self._rounds_products and cache_dtype.itemsize <= 2 and compiled().has_pairs

    def products(self, cache_dtype: torch.dtype) -> str | None:
        """See ``Kernel.products``."""
        if not self.multiplies_pairs(cache_dtype):
            return None
        return "bfloat16" if levels.has_matrix_unit() else "16-bit integers"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``; compiles the kernel if there is no other reason."""
        reasons = []
        if device.type != "cpu":
            reasons.append(f"cpu_paged computes on the CPU, not on {device.type}")
        reasons += dtype_refusal(self.name, dtype)
        if not reasons:
            try:
                compiled()
                if select.knows(pattern):
                    select.compiled()
            except native.NativeError as error:
                reasons.append(f"cpu_paged cannot be compiled here: {error}")
        return reasons

    def plan(self, kind: Kind, batch: AttentionBatch) -> PagedPlan:
        """See ``Kernel.plan``."""
        (layer, pattern, *_), host, device = kind, batch.host, batch.device
        parts: list[NativePart] | list[TorchPart] = []
        if select.knows(pattern):
            rows = selecting(batch.visible, pattern)
            heads = layer.kv_heads
            parts = [NativePart(pattern, select.rows_of(pattern, heads, part, batch)) for part in rows]
        elif isinstance(pattern, ContentPattern):
            rows = selecting(batch.visible, pattern)
            parts = [TorchPart(pattern, KnownRows(host, device, part)) for part in rows]
        by_rule, table = ruled(batch.visible, layer.window, pattern), device.page_table.contiguous()
        pairs = self.multiplies_pairs(kind.cache_dtype)
        return PagedPlan(pattern.rerotated, host.page_size, table, pairs, given(host), by_rule, parts)

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: PagedPlan,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        wide = query.float()
        near = rerotated.float() if rerotated is not None and plan.rerotated else None
        if wide.stride(-1) != 1 or (near is not None and near.stride() != wide.stride()):
            wide, near = wide.contiguous(), None if near is None else near.contiguous()
        output = wide.new_empty(len(query), layer.query_heads, layer.value_size)
        weights = None if sinks is None else sinks.float().contiguous()
        if len(plan.ruled.rows):
            _attend(layer, wide, near, cache, plan, plan.ruled, weights, output)
        for part in plan.selecting:
            selected = _selected(layer, query, wide, part, cache, plan)
            _attend(layer, wide, near, cache, plan, selected, weights, output)
        return output.to(query.dtype)

    def update(self, layer: LayerSpec, cache: LayerCache, written: Written, pattern: ContentPattern) -> None:
        """See ``Kernel.update``; in C++ where ``select`` knows the pattern."""
        if select.knows(pattern):
            select.update(layer, cache, written)
        else:
            pattern.update(layer, cache, written)


def _selected(
    layer: LayerSpec,
    query: torch.Tensor,
    wide: torch.Tensor,
    part: NativePart | TorchPart,
    cache: LayerCache,
    plan: PagedPlan,
) -> Rows:
    """The rows of a part with the ranges that they select."""
    if isinstance(part, NativePart):
        kept = part.rows
        ranges = select.select(part.pattern, layer, wide, kept, cache, plan.page_table, plan.page_size)
        return Rows(kept.rows, kept.owners, ranges)
    rows = part.rows
    ranges = part.pattern.select(layer, query[rows.rows], rows, cache)
    ranges = spans_within(ranges, rows.positions, layer.window)
    return Rows(rows.rows, rows.batch.owners[rows.rows], ranges.contiguous())


def _attend(
    layer: LayerSpec,
    query: torch.Tensor,
    rerotated: torch.Tensor | None,
    cache: LayerCache,
    plan: PagedPlan,
    rows: Rows,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Fills ``output`` ``[T, H, Dv]`` at ``rows``; as in ``Kernel.forward``, floats but for the cache."""
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    made = compiled()
    made.attend(
        ctypes.byref(
            Call(
                query.data_ptr(),
                None if rerotated is None else rerotated.data_ptr(),
                cache.keys.data_ptr(),
                cache.values.data_ptr(),
                plan.page_table.data_ptr(),
                rows.rows.data_ptr(),
                rows.owners.data_ptr(),
                rows.ranges.data_ptr(),
                plan.given.data_ptr(),
                None if sinks is None else sinks.data_ptr(),
                output.data_ptr(),
                made.team,
                *rows.ranges.shape[:3],
                layer.query_heads,
                layer.kv_heads,
                layer.head_size,
                layer.value_size,
                query.stride(0),
                query.stride(1),
                plan.page_size,
                plan.page_table.shape[1],
                plan.rerotated,
                DTYPES[cache.keys.dtype],
                plan.pairs,
                torch.get_num_threads(),
                layer.scale,
                layer.softcap or 0.0,
            )
        )
    )
