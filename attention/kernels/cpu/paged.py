"""A kernel in C++ that reads keys and values where they lie; see paged.cpp."""

from __future__ import annotations

import ctypes

import torch

from attention.kernels.base import Kernel, format_refusal, spans_within
from attention.kernels.cpu import native, select
from attention.kernels.cpu.calls import FORMATS, Call, compiled
from attention.kernels.cpu.plan import Rows, choosing, given, ruled
from attention.patterns.base import ContentPattern, Pattern
from attention.types import AttentionBatch, LayerCache, LayerSpec


class CpuPaged(Kernel):
    """Computes every feature of ``LayerSpec`` under any pattern, on the CPU, in float32 inside.

    Compiled for the machine when first chosen. To the last bit, a row's result depends neither on other
    sequences nor, where it belongs to the prompt, on how this is cut into steps. What comes after the prompt
    is computed one row at a time in another order of sums; of several rows of it at once, as after
    preemption, the last bits may come out otherwise.
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
        reasons += format_refusal(self.name, dtype)
        if not reasons:
            try:
                compiled()
                if select.knows(pattern):
                    select.compiled()
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
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        wide = query.float()
        near = rerotated.float() if rerotated is not None and pattern.rerotated else None
        if wide.stride(-1) != 1 or (near is not None and near.stride() != wide.stride()):
            wide, near = wide.contiguous(), None if near is None else near.contiguous()
        output = wide.new_empty(len(query), layer.query_heads, layer.value_size)
        weights = None if sinks is None else sinks.float().contiguous()
        by_rule = ruled(batch, layer.window, pattern)
        if len(by_rule.rows):
            _attend(layer, wide, near, cache, batch, pattern.rerotated, by_rule, weights, output)
        if isinstance(pattern, ContentPattern):
            for rows in choosing(batch, pattern):
                chosen = _chosen(layer, query, wide, rows, cache, batch, pattern)
                _attend(layer, wide, near, cache, batch, pattern.rerotated, chosen, weights, output)
        return output.to(query.dtype)

    def update(
        self, layer: LayerSpec, cache: LayerCache, batch: AttentionBatch, pattern: ContentPattern
    ) -> None:
        """See ``Kernel.update``; in C++ where ``select`` knows the pattern."""
        if select.knows(pattern):
            select.update(pattern, layer, cache, batch)
        else:
            pattern.update(layer, cache, batch)


def _chosen(
    layer: LayerSpec,
    query: torch.Tensor,
    wide: torch.Tensor,
    rows: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    pattern: ContentPattern,
) -> Rows:
    """What ``rows`` choose: in C++ where ``select`` knows the pattern, else in torch."""
    if select.knows(pattern):
        kept = select.rows_of(pattern, layer.kv_heads, rows, batch)
        return Rows(kept.rows, kept.owners, select.select(pattern, layer, wide, kept, cache, batch))
    ranges = pattern.select(layer, query[rows], rows, cache, batch)
    ranges = spans_within(ranges, batch.positions[rows], layer.window)
    return Rows(rows, batch.owners[rows], ranges.contiguous())


def _attend(
    layer: LayerSpec,
    query: torch.Tensor,
    rerotated: torch.Tensor | None,
    cache: LayerCache,
    batch: AttentionBatch,
    near: int,
    rows: Rows,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Fills ``output`` ``[T, H, Dv]`` at ``rows``; as in ``Kernel.forward``, floats but for the cache."""
    table = batch.page_table.contiguous()
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
                table.data_ptr(),
                rows.rows.data_ptr(),
                rows.owners.data_ptr(),
                rows.ranges.data_ptr(),
                given(batch).data_ptr(),
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
                batch.page_size,
                table.shape[1],
                near,
                FORMATS[cache.keys.dtype],
                torch.get_num_threads(),
                layer.scale,
                layer.softcap or 0.0,
            )
        )
    )
