"""The loop over tiles of tokens in the programs of ``triton_code``.

Softmax is computed online (Milakov and Gimelshein: Online normalizer calculation for softmax, 2018), to the
base of 2, in float32.
"""

import triton
import triton.language as tl

# Whether Triton's interpreter runs the programs, in place of a GPU; decided when they are defined.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _product(left, right, total):
    """The matrix product, added to ``total``."""
    if INTERPRETED:
        # The interpreter stores bfloat16 as integers of the same bits, and would multiply these.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _widened(codes, like):
    """Numbers of float8_e4m3, given as bytes, in the dtype of ``like``; any others unchanged.

    Done with integers since not every GPU knows the dtype. In float16, whose exponents are biased by 8 more,
    the same bits are 2^-8 times the number. All ones are NaN: the exponent's first bit is added.
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
def accumulate(
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
    range_count,
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
    """Adds the tokens ``[begin, end)`` of a cover to the running sums, maxima and weighted values."""
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
                    # Ranges beyond those of the batch are empty.
                    mask = row_valid & (k < range_count)
                    at = ranges + (row * range_count + k) * 2
                    low = tl.load(at, mask=mask, other=0)
                    high = tl.load(at + 1, mask=mask, other=0)
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
