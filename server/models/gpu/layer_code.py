"""What stands between the products of a decoder layer, as Triton programs: what runs on the device.

Each reads its numbers once, computes in float32 and rounds once. How many rows there are, only the grid says,
so that one program does for all steps.
"""

import triton
import triton.language as tl


@triton.jit
def norm(rows, row_stride, weight, output, epsilon, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of rows (Zhang and Sennrich: Root Mean Square Layer Normalization, 2019).

    The grid is ``(T,)``: rows of ``SIZE`` numbers to rows that lie side by side.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < SIZE
    numbers = tl.load(rows + row * row_stride + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers) / SIZE + epsilon)
    result = numbers * scale * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * SIZE + at, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def rotate(
    rows,
    row_stride,
    cosines,
    sines,
    query_weight,
    key_weight,
    epsilon,
    QUERY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotary embedding of halves (Su et al.: RoFormer, 2021) of each row's first ``HEADS`` heads, in place.

    The grid is ``(T, tiles of BLOCK_H heads)``. A row has ``QUERY_HEADS`` heads of queries, then those of
    keys, of ``2 * HALF`` numbers each; cosines and sines are ``[T, 2 * HALF]``. Where there are weights, each
    head goes through RMSNorm before.
    """
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    at = tl.arange(0, BLOCK_HALF)[None, :]
    inside = at < HALF
    mask = (head < HEADS) & inside
    left = rows + row * row_stride + head * (2 * HALF) + at
    right = left + HALF
    first = tl.load(left, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(right, mask=mask, other=0.0).to(tl.float32)
    if query_weight is not None:
        mean = tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * HALF)
        scale = tl.rsqrt(mean + epsilon)
        is_query = head < QUERY_HEADS
        first *= scale * _either(is_query, query_weight, key_weight, at, inside)
        second *= scale * _either(is_query, query_weight, key_weight, at + HALF, inside)
    angle = row * (2 * HALF) + at
    first_result = first * _number(cosines + angle, inside) - second * _number(sines + angle, inside)
    angle += HALF
    second_result = second * _number(cosines + angle, inside) + first * _number(sines + angle, inside)
    # Threads may read what is another's to write.
    tl.debug_barrier()
    tl.store(left, first_result.to(rows.dtype.element_ty), mask=mask)
    tl.store(right, second_result.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def gate(rows, row_stride, output, SIZE: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """The gated activation: ``activation(gate) * up`` (Shazeer: GLU Variants Improve Transformer, 2020).

    The grid is ``(T, tiles of BLOCK)``. A row has ``SIZE`` numbers of the gate, then as many to be let
    through; rows of the output have ``SIZE`` and lie side by side. The activation is SiLU, or GELU in the
    form with tanh.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    place = rows + row * row_stride + at
    x = _number(place, mask)
    # Both are x * sigmoid(y), since (1 + tanh(y / 2)) / 2 is sigmoid(y); 1.5957... is 2 * sqrt(2 / pi).
    y = x
    if GELU:
        y = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    result = x / (1.0 + tl.exp(-y)) * _number(place + SIZE, mask)
    tl.store(output + row * SIZE + at, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _number(place, mask):
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _either(condition, one, other, at, mask):
    return tl.where(condition, _number(one + at, mask), _number(other + at, mask))
