"""Attention that reads the pages in place on a GPU, by Triton programs."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from attention.batch import AttentionBatch
from attention.dtypes import cast
from attention.kernels import triton_write
from attention.kernels.base import Kind, dtype_refusal, layer_ranges, power_of_two, spans_within
from attention.kernels.capturable import Capturable
from attention.kernels.triton_device import device_of
from attention.kernels.triton_plan import (
    COVER_FIELDS,
    LOG2_E,
    Blocks,
    Heads,
    Tile,
    captured_blocks,
    compact,
    plan_captured,
    plan_rows,
    plan_selecting,
)
from attention.kernels.triton_tiles import padded, tiles
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.blocks import CapturedRows, KnownRows, SelectingRows
from attention.step import DeviceBatch
from attention.types import LayerCache, LayerSpec

# Older hardware has neither bfloat16 nor asynchronous copies to shared memory.
_LEAST_CAPABILITY = (8, 0)

# Larger heads' tiles would not fit registers and shared memory.
_LARGEST_HEAD = 512

# Rows that select at once; bounded, since their ranges may be many.
_SELECTING_ROWS = 128

# The number of ranges of a selection differs from step to step; up to this many share one compiled program.
_SELECTED_RANGES = 32


class SelectingPart(NamedTuple):
    """Rows that select by content, their pattern, and the blocks that they are cut into."""

    pattern: ContentPattern
    rows: SelectingRows
    blocks: Blocks


class TritonPlan(NamedTuple):
    """The launches of a step in layers of a kind.

    Attributes:
        batch: the step.
        ruled: rows whose ranges follow from a rule over positions, with their covers.
        selecting: the others, whose covers each layer selects.
    """

    batch: DeviceBatch
    ruled: list[tuple[Blocks, torch.Tensor]]
    selecting: list[SelectingPart]


class Triton(Capturable[TritonPlan]):
    """Computes every feature of ``LayerSpec`` and any pattern, since programs take patterns as ranges.

    Single rows (decode rows, and those that select by content) are blocks of one row; chunks are cut into
    blocks of rows. If blocks are too few to fill the device, their keys are split over several programs; see
    ``triton_code``. Products of float32 are computed in float32, without tensor cores.
    """

    name = "triton"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``."""
        if find_spec("triton") is None:
            return ["triton is not installed; install the package triton"]
        reasons = []
        if device.type == "cuda":
            reasons += _lacking(device)
        elif not ("TRITON_INTERPRET" in os.environ and _code().INTERPRETED.value):
            reasons.append(
                f"triton computes on a CUDA device, not on {device.type} (where its interpreter can, for "
                "tests: TRITON_INTERPRET=1)"
            )
        reasons += dtype_refusal(self.name, dtype)
        if large := [layer for layer in layers if max(layer.head_size, layer.value_size) > _LARGEST_HEAD]:
            reasons.append(f"triton takes head sizes up to {_LARGEST_HEAD} ({layer_ranges(large)})")
        return reasons

    def uncapturable(self, pattern: Pattern) -> str | None:
        """See ``Capturable.uncapturable``."""
        if isinstance(pattern, ContentPattern) and not pattern.capturable:
            return f"{pattern.name} plans what its queries select on the host"
        return None

    def write(self, cache: LayerCache, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """See ``Kernel.write``."""
        triton_write.write(cache, slots, key, value)

    def plan(self, kind: Kind, batch: AttentionBatch) -> TritonPlan:
        """See ``Kernel.plan``."""
        pattern, (heads, (single, chunked), processors) = kind.pattern, _cut(kind, batch.device)
        selecting: list[SelectingPart] = []
        if isinstance(pattern, ContentPattern):
            every = batch.visible.selecting(pattern)
            for first in range(0, len(every), _SELECTING_ROWS):
                known = every[first : first + _SELECTING_ROWS]
                blocks = plan_selecting(batch, known, heads, single, processors)
                rows = KnownRows(batch.host, batch.device, known)
                selecting.append(SelectingPart(pattern, rows, blocks))
        ruled = plan_rows(batch, kind.layer.window, pattern, heads, single, chunked, processors)
        return TritonPlan(batch.device, ruled, selecting)

    def plan_captured(self, kind: Kind, batch: DeviceBatch) -> TritonPlan:
        """See ``Capturable.plan_captured``. Under a content pattern all rows select: none is a prompt's."""
        pattern, (heads, (single, _), processors) = kind.pattern, _cut(kind, batch)
        if isinstance(pattern, ContentPattern):
            most = pattern.most_pages(batch.page_size)
            blocks = captured_blocks(batch, heads, single, processors, most)
            return TritonPlan(batch, [], [SelectingPart(pattern, CapturedRows(batch), blocks)])
        ruled = plan_captured(batch, kind.layer.window, pattern, heads, single, processors)
        return TritonPlan(batch, [ruled], [])

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: TritonPlan,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``; queries are cast to the cache's dtype, unless that has 8 bits."""
        dtype = _dtype(query.dtype, cache.keys.dtype)
        output = query.new_empty(*query.shape[:2], layer.value_size)
        call = _Call(
            layer,
            _heads(layer),
            _dense_heads(cast(query, dtype)),
            cache,
            plan.batch,
            sinks,
            None if rerotated is None else _dense_heads(cast(rerotated, dtype)),
            output,
        )
        for part in plan.selecting:
            _launch(call, part.blocks, _selected(call, part, query))
        for blocks, covers in plan.ruled:
            _launch(call, blocks, covers)
        return output


def _heads(layer: LayerSpec) -> Heads:
    return Heads(layer.kv_heads, layer.query_heads // layer.kv_heads)


def _dtype(query: torch.dtype, cache: torch.dtype) -> torch.dtype:
    """The dtype in which products are computed."""
    return query if cache == torch.float8_e4m3fn else cache


def _cut(kind: Kind, batch: DeviceBatch) -> tuple[Heads, tuple[Tile, Tile], int]:
    """Heads, tiles for single rows and for chunks, and the device's multiprocessors."""
    processors, shared_memory, _ = device_of(batch.page_table.device)
    dtype = _dtype(kind.query_dtype, kind.cache_dtype)
    return _heads(kind.layer), tiles(kind.layer, dtype, shared_memory), processors


def _selected(call: _Call, part: SelectingPart, query: torch.Tensor) -> torch.Tensor:
    """The covers of rows that select; ``query`` in its own dtype, before it is cast."""
    spans = part.pattern.select(call.layer, query[part.rows.rows], part.rows, call.cache)
    spans = spans_within(spans, part.rows.positions, call.layer.window)
    return compact(spans, part.pattern.rerotated, _SELECTED_RANGES)


class _Call(NamedTuple):
    """The arguments of ``Kernel.forward``, and the output to fill."""

    layer: LayerSpec
    heads: Heads
    query: torch.Tensor
    cache: LayerCache
    batch: DeviceBatch
    sinks: torch.Tensor | None
    rerotated: torch.Tensor | None
    output: torch.Tensor


def _launch(call: _Call, blocks: Blocks, covers: torch.Tensor) -> None:
    """Computes the rows of ``blocks`` into the output."""
    layer, heads, tile, output = call.layer, call.heads, blocks.tile, call.output
    keys, values, table = call.cache.keys, call.cache.values, call.batch.page_table
    if keys.dtype == torch.float8_e4m3fn:  # which not every device's Triton knows
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    grid = len(blocks.items), heads.columns(tile)
    partial = partial_log = None
    if blocks.parts:
        partial = output.new_empty(*grid, tile.pairs, layer.value_size, dtype=torch.float32)
        partial_log = output.new_empty(*grid, tile.pairs, dtype=torch.float32)
    capped = layer.softcap is not None
    range_count = 0 if blocks.ranges is None else blocks.ranges.shape[1]
    shared: dict[str, Any] = {
        "output": output,
        "partial": partial,
        "partial_log": partial_log,
        "blocks": blocks.blocks,
        "items": blocks.items,
        "KV_HEADS": heads.kv_heads,
        "GROUP": heads.group,
        "VALUE_SIZE": layer.value_size,
        "BLOCK_M": tile.pairs,
        "BLOCK_V": padded(layer.value_size),
        "num_warps": tile.warps,
    }
    with torch.cuda.device_of(output):
        _code().attend[grid](
            **shared,
            query=call.query,
            query_row_stride=call.query.stride(0),
            query_head_stride=call.query.stride(1),
            rerotated=call.rerotated,
            rerotated_row_stride=0 if call.rerotated is None else call.rerotated.stride(0),
            rerotated_head_stride=0 if call.rerotated is None else call.rerotated.stride(1),
            keys=keys,
            key_slot_stride=keys.stride(1),
            key_head_stride=keys.stride(2),
            values=values,
            value_slot_stride=values.stride(1),
            value_head_stride=values.stride(2),
            table=table,
            table_stride=table.stride(0),
            sinks=call.sinks,
            covers=covers,
            ranges=blocks.ranges,
            range_count=range_count,
            inner=2 * LOG2_E * layer.scale / layer.softcap if layer.softcap is not None else 0.0,
            outer=LOG2_E * (layer.scale if layer.softcap is None else layer.softcap),
            HEAD_SIZE=layer.head_size,
            PAGE_SIZE=call.batch.page_size,
            COVER_HEADS=covers.shape[1],
            LEVELS=((covers.shape[2] - COVER_FIELDS) // 2).bit_length() - 1,
            ROW_RANGES=power_of_two(range_count) if range_count else 0,
            SOFTCAP=capped,
            # Tiles of a cover that begins with the sequence begin where a page does.
            ONE_PAGE=blocks.straight and call.rerotated is None and call.batch.page_size % tile.tokens == 0,
            BLOCK_N=tile.tokens,
            BLOCK_D=padded(layer.head_size),
            num_stages=tile.stages,
        )
        if blocks.parts:
            _code().combine[(len(blocks.blocks), grid[1])](**shared)


def _dense_heads(query: torch.Tensor) -> torch.Tensor:
    """The same queries, with each head's numbers contiguous."""
    return query if query.stride(2) == 1 else query.contiguous()


@cache
def _code() -> Any:
    """The programs; importing them needs Triton."""
    return import_module("attention.kernels.triton_code")


def _lacking(device: torch.device) -> list[str]:
    """The reason, if this machine cannot run Triton on ``device``."""
    if not torch.cuda.is_available():
        return ["triton needs a CUDA device that torch can use; torch.cuda.is_available() says there is none"]
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return []
    least, own = (".".join(map(str, numbers)) for numbers in (_LEAST_CAPABILITY, capability))
    return [f"triton needs compute capability {least} or later, and {device} has {own}"]
