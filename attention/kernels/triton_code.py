"""Attention over a paged cache, as Triton programs: what runs on the device.

The host cuts the queries into *blocks* of consecutive rows of one sequence and says for each which tokens its
rows see together, its *cover*, as ranges of positions. The tokens of a cover are numbered from 0, without the
gaps: a program takes them in tiles of ``BLOCK_N`` and finds each one's position by a search over the
ranges, so that a pattern of many short ranges reads no more than it must, and so that covers can be cut
into equal *parts* for programs of their own (Dao et al.: Flash-Decoding, 2023).

Softmax is computed online (Milakov and Gimelshein: Online normalizer calculation for softmax, 2018), to the
base of 2, in float32.
"""

import triton
import triton.language as tl

from attention.kernels import triton_plan

# Whether Triton's interpreter runs the programs, in place of a GPU; decided when they are defined.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2_E = tl.constexpr(triton_plan.LOG2_E)
BLOCK_FIELDS = tl.constexpr(triton_plan.BLOCK_FIELDS)
ITEM_FIELDS = tl.constexpr(triton_plan.ITEM_FIELDS)
COVER_FIELDS = tl.constexpr(triton_plan.COVER_FIELDS)


@triton.jit
def _product(left, right, total):
    """The matrix product, added to ``total``."""
    if INTERPRETED:
        # It keeps bfloat16 as whole numbers of the same bits, and would multiply these.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _widened(codes, like):
    """Numbers of float8_e4m3, given as bytes, in the format of ``like``; any others as they are.

    Done with whole numbers since not every GPU knows the format. In float16, whose exponents are biased by
    8 more, the same bits are 2^-8 of the number. All ones are no number: the exponent's first bit is added.
    """
    if codes.dtype == tl.uint8:
        wide = codes.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        bits |= (bits + 0x80) & 0x4000
        codes = (bits.to(tl.float16, bitcast=True) * 256.0).to(like.dtype)
    return codes


@triton.jit
def _tanh(x):
    """From powers of 2 that cannot overflow; ``x`` has been multiplied by twice the binary logarithm of e."""
    fall = tl.exp2(-tl.abs(x))
    size = (1.0 - fall) / (1.0 + fall)
    return tl.where(x < 0, -size, size)


@triton.jit
def _locate(
    index,
    end,
    starts,
    shifts,
    pages,
    PAGE_SIZE: tl.constexpr,
    LEVELS: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Positions and slots of the tokens ``index + [0, BLOCK_N)`` of a cover, and which can be read."""
    tokens = index + tl.arange(0, BLOCK_N)
    inside = tokens < end
    if LEVELS == 0:
        positions = tokens + tl.load(shifts)
    else:
        found = tl.zeros_like(tokens)
        for level in tl.static_range(LEVELS):
            probe = found + (1 << (LEVELS - 1 - level))
            found = tl.where(tl.load(starts + probe) <= tokens, probe, found)
        positions = tokens + tl.load(shifts + found)
    if ONE_PAGE:
        page = tl.load(pages + index // PAGE_SIZE, mask=index < end, other=0)
    else:
        page = tl.load(pages + positions // PAGE_SIZE, mask=inside, other=0)
    slots = page.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE
    return positions, slots, inside & (page != 0)


@triton.jit
def _accumulate(
    query,
    total,
    most,
    sums,
    begin,
    end,
    starts,
    shifts,
    pages,
    keys,
    key_stride,
    values,
    value_stride,
    ranges,
    row,
    row_valid,
    full_begin,
    full_end,
    inner,
    outer,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LEVELS: tl.constexpr,
    ROW_RANGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Takes the tokens ``[begin, end)`` of a cover into the running sums, maxima and weighted values."""
    at_d = tl.arange(0, BLOCK_D)
    at_v = tl.arange(0, BLOCK_V)
    positions, slots, there = _locate(begin, end, starts, shifts, pages, PAGE_SIZE, LEVELS, ONE_PAGE, BLOCK_N)
    for index in range(begin, end, BLOCK_N):
        key = tl.load(
            keys + slots[None, :] * key_stride + at_d[:, None],
            mask=there[None, :] & (at_d < HEAD_SIZE)[:, None],
            other=0,
        )
        value = tl.load(
            values + slots[:, None] * value_stride + at_v[None, :],
            mask=there[:, None] & (at_v < VALUE_SIZE)[None, :],
            other=0,
        )
        key = _widened(key, query)
        value = _widened(value, query)
        logits = _product(query, key, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
        if SOFTCAP:
            logits = _tanh(logits * inner)
        logits *= outer
        logits = tl.where(there[None, :], logits, float("-inf"))
        if ROW_RANGES > 0:
            # Most tiles are seen by all rows from end to end.
            if (index < full_begin) | (index + BLOCK_N > full_end):
                visible = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int1)
                for k in tl.static_range(ROW_RANGES):
                    at = ranges + (row * ROW_RANGES + k) * 2
                    low = tl.load(at, mask=row_valid, other=0)
                    high = tl.load(at + 1, mask=row_valid, other=0)
                    visible |= (positions[None, :] >= low[:, None]) & (positions[None, :] < high[:, None])
                logits = tl.where(visible, logits, float("-inf"))
        # Found before they are needed: the next tile's pages need not be waited for.
        positions, slots, there = _locate(
            index + BLOCK_N, end, starts, shifts, pages, PAGE_SIZE, LEVELS, ONE_PAGE, BLOCK_N
        )
        higher = tl.maximum(most, tl.max(logits, axis=1))
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - base[:, None])
        faded = tl.exp2(most - base)
        sums = sums * faded + tl.sum(weights, axis=1)
        total = _product(weights.to(value.dtype), value, total * faded[:, None])
        most = higher
    return total, most, sums


@triton.jit(do_not_specialize=["table_stride"])
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
        rerotated: the same as they meet the first tokens, if that differs.
        keys: ``[slots, KV_HEADS, HEAD_SIZE]`` in the queries' dtype or, as bytes, in float8_e4m3, and
            its strides.
        values: ``[slots, KV_HEADS, VALUE_SIZE]``, likewise, and its strides.
        table: int32 ``[B, P]``, the page table, and its stride.
        sinks: ``[KV_HEADS * GROUP]``, the learned sinks, if there are.
        blocks: int32 ``[blocks, BLOCK_FIELDS]``.
        items: int32 ``[items, ITEM_FIELDS]``.
        covers: int32 ``[blocks, COVER_HEADS, COVER_FIELDS + 2 * 2**LEVELS]``, see ``triton_plan.compact``.
        ranges: int32 ``[T, ROW_RANGES, 2]``, what each row sees, if that is not its block's cover.
        inner: with SOFTCAP, the factor on what the hyperbolic tangent is taken of, see ``_tanh``.
        outer: the factor on what becomes an exponent of 2.
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
        total, most, sums = _accumulate(
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
    total, most, sums = _accumulate(
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


@triton.jit
def combine(
    output,
    partial,
    partial_log,
    blocks,
    items,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Puts the parts of one block together, for one KV head and ``BLOCK_M`` of its pairs; see ``attend``.

    The grid is ``(blocks, KV_HEADS * tiles of pairs)``. Each part counts by its denominator.
    """
    column = tl.program_id(1)
    fields = blocks + tl.program_id(0) * BLOCK_FIELDS
    first_row = tl.load(fields)
    rows = tl.load(fields + 1)
    first_item = tl.load(fields + 5)
    parts = tl.load(items + first_item * ITEM_FIELDS + 2)

    head = column % KV_HEADS
    lane = tl.arange(0, BLOCK_M)
    pairs = column // KV_HEADS * BLOCK_M + lane
    valid = pairs < rows * GROUP
    at_v = tl.arange(0, BLOCK_V)
    value_mask = valid[:, None] & (at_v < VALUE_SIZE)[None, :]

    total = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    for part in range(parts):
        place = ((first_item + part).to(tl.int64) * tl.num_programs(1) + column) * BLOCK_M + lane
        log = tl.load(partial_log + place, mask=valid, other=float("-inf"))
        result = tl.load(partial + place[:, None] * VALUE_SIZE + at_v[None, :], mask=value_mask, other=0.0)
        higher = tl.maximum(most, log)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(log - base)
        faded = tl.exp2(most - base)
        total = total * faded[:, None] + result * weight[:, None]
        sums = sums * faded + weight
        most = higher
    result = total / tl.where(sums > 0.0, sums, 1.0)[:, None]
    row = (first_row + pairs // GROUP).to(tl.int64)
    query_head = head * GROUP + pairs % GROUP
    tl.store(
        output + ((row * (KV_HEADS * GROUP) + query_head) * VALUE_SIZE)[:, None] + at_v[None, :],
        result.to(output.dtype.element_ty),
        mask=value_mask,
    )
