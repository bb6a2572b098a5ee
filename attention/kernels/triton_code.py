"""Attention over a paged cache, as Triton programs that run on the device.

The host cuts the queries into *blocks* of consecutive rows of one sequence. A block's *cover* is the union of
its rows' ranges of positions. The tokens of a cover are numbered from 0, without the gaps: a program takes
them in tiles of ``BLOCK_N`` and finds each one's position by a search over the ranges. So a pattern of many
short ranges reads no more than it must, and covers can be cut into equal *parts*, one program each (Dao et
al.: Flash-Decoding, 2023).

Each combination of constants, in capitals, is compiled at its first launch, while requests wait. There are
few: constants follow from the model, the page size and the tile, or are counts rounded up to a power of two.
"""

import triton
import triton.language as tl

from attention.kernels import triton_plan
from attention.kernels.triton_combine_code import combine
from attention.kernels.triton_tile_code import INTERPRETED, accumulate

__all__ = ["INTERPRETED", "attend", "combine"]

LOG2_E = tl.constexpr(triton_plan.LOG2_E)
BLOCK_FIELDS = tl.constexpr(triton_plan.BLOCK_FIELDS)
ITEM_FIELDS = tl.constexpr(triton_plan.ITEM_FIELDS)
COVER_FIELDS = tl.constexpr(triton_plan.COVER_FIELDS)


@triton.jit(do_not_specialize=["table_stride", "range_count"])
def attend(
    output,
    partial,
    partial_log,
    query,
    query_row_stride,
    query_head_stride,
    rerotated,
    rerotated_row_stride,
    rerotated_head_stride,
    keys,
    key_slot_stride,
    key_head_stride,
    values,
    value_slot_stride,
    value_head_stride,
    table,
    table_stride,
    sinks,
    blocks,
    items,
    covers,
    ranges,
    range_count,
    inner,
    outer,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    COVER_HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROW_RANGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One part of one block's cover, for one KV head and ``BLOCK_M`` of the block's (row, query head) pairs.

    The grid is ``(items, KV_HEADS * tiles of pairs)``. A block's pairs are numbered row by row.

    Args:
        output: ``[T, KV_HEADS * GROUP, VALUE_SIZE]``, contiguous; written if not ``partial``.
        partial: float32 ``[items, grid[1], BLOCK_M, VALUE_SIZE]``: each part's result,
            if covers are cut into parts.
        partial_log: float32 ``[items, grid[1], BLOCK_M]``: the logarithm of each part's denominator.
        query: ``[T, KV_HEADS * GROUP, HEAD_SIZE]``, and its strides.
        rerotated: the queries rerotated for the first tokens, if the pattern rerotates them.
        keys: ``[slots, KV_HEADS, HEAD_SIZE]`` in the queries' dtype or, as bytes, in float8_e4m3, and
            its strides.
        values: ``[slots, KV_HEADS, VALUE_SIZE]``, likewise, and its strides.
        table: int32 ``[B, P]``, the page table, and its stride.
        sinks: ``[KV_HEADS * GROUP]``, the learned sinks, if there are any.
        blocks: int32 ``[blocks, BLOCK_FIELDS]``.
        items: int32 ``[items, ITEM_FIELDS]``.
        covers: int32 ``[blocks, COVER_HEADS, COVER_FIELDS + 2 * 2**LEVELS]``, see ``triton_plan.compact``.
        ranges: int32 ``[T, range_count, 2]``, each row's ranges, if they differ from its block's cover.
        range_count: at most ROW_RANGES, which is a power of two, or 0 without ``ranges``.
        inner: with SOFTCAP, the factor on the argument of the hyperbolic tangent, see ``_tanh``.
        outer: the factor on logits that makes them exponents of 2.
    """
    item = tl.program_id(0)
    column = tl.program_id(1)
    block = tl.load(items + item * ITEM_FIELDS)
    part = tl.load(items + item * ITEM_FIELDS + 1)
    parts = tl.load(items + item * ITEM_FIELDS + 2)
    fields = blocks + block * BLOCK_FIELDS
    first_row = tl.load(fields)
    rows = tl.load(fields + 1)
    sequence = tl.load(fields + 2)
    full_begin = tl.load(fields + 3)
    full_end = tl.load(fields + 4)

    head = column % KV_HEADS
    pairs = column // KV_HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = pairs < rows * GROUP
    row = (first_row + pairs // GROUP).to(tl.int64)
    query_head = head * GROUP + pairs % GROUP

    cover = covers + (block * COVER_HEADS + head % COVER_HEADS) * (COVER_FIELDS + (2 << LEVELS))
    starts = cover + COVER_FIELDS
    shifts = starts + (1 << LEVELS)
    tokens = tl.load(cover)
    size = tl.cdiv(tl.cdiv(tokens, parts), BLOCK_N) * BLOCK_N
    begin = part * size
    end = tl.minimum(tokens, begin + size)

    pages = table + sequence.to(tl.int64) * table_stride
    head_keys = keys + head * key_head_stride
    head_values = values + head * value_head_stride

    at_d = tl.arange(0, BLOCK_D)
    at_v = tl.arange(0, BLOCK_V)
    pair_mask = valid[:, None] & (at_d < HEAD_SIZE)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    if sinks is not None:
        # The sink is one more logit, whose value is zero; the first part has seen it before all others.
        sink = tl.load(sinks + query_head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        most = tl.where(part == 0, sink, float("-inf"))
        sums = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        most = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_M], dtype=tl.float32)

    if rerotated is not None:
        boundary = tl.minimum(tl.maximum(tl.load(cover + 1), begin), end)
        tile = (
            tl.load(
                rerotated
                + row[:, None] * rerotated_row_stride
                + (query_head * rerotated_head_stride)[:, None]
                + at_d[None, :],
                mask=pair_mask,
                other=0.0,
            )
            .to(tl.float32)
            .to(query.dtype.element_ty)
        )
        total, most, sums = accumulate(
            tile,
            total,
            most,
            sums,
            begin,
            boundary,
            starts,
            shifts,
            pages,
            head_keys,
            key_slot_stride,
            head_values,
            value_slot_stride,
            ranges,
            range_count,
            row,
            valid,
            full_begin,
            full_end,
            inner,
            outer,
            HEAD_SIZE,
            VALUE_SIZE,
            PAGE_SIZE,
            LEVELS,
            ROW_RANGES,
            SOFTCAP,
            ONE_PAGE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )
        begin = boundary
    tile = (
        tl.load(
            query
            + row[:, None] * query_row_stride
            + (query_head * query_head_stride)[:, None]
            + at_d[None, :],
            mask=pair_mask,
            other=0.0,
        )
        .to(tl.float32)
        .to(query.dtype.element_ty)
    )
    total, most, sums = accumulate(
        tile,
        total,
        most,
        sums,
        begin,
        end,
        starts,
        shifts,
        pages,
        head_keys,
        key_slot_stride,
        head_values,
        value_slot_stride,
        ranges,
        range_count,
        row,
        valid,
        full_begin,
        full_end,
        inner,
        outer,
        HEAD_SIZE,
        VALUE_SIZE,
        PAGE_SIZE,
        LEVELS,
        ROW_RANGES,
        SOFTCAP,
        ONE_PAGE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
    )

    seen = sums > 0.0
    result = total / tl.where(seen, sums, 1.0)[:, None]
    value_mask = valid[:, None] & (at_v < VALUE_SIZE)[None, :]
    if partial is not None:
        place = (item.to(tl.int64) * tl.num_programs(1) + column) * BLOCK_M + tl.arange(0, BLOCK_M)
        log = tl.where(seen, most + tl.log2(tl.where(seen, sums, 1.0)), float("-inf"))
        tl.store(partial_log + place, log, mask=valid)
        tl.store(partial + place[:, None] * VALUE_SIZE + at_v[None, :], result, mask=value_mask)
    else:
        tl.store(
            output + ((row * (KV_HEADS * GROUP) + query_head) * VALUE_SIZE)[:, None] + at_v[None, :],
            result.to(output.dtype.element_ty),
            mask=value_mask,
        )
