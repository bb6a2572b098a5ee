"""Products with weights of 8 bits, as Triton programs: what runs on the device.

A weight is a code times the scale of its output row and of its group of neighboring inputs. Codes become
numbers of the activations' format, which holds each exactly, and are multiplied on tensor cores; a group's
sum, in float32, is multiplied by the group's scale and added to those before it. Results are rounded once.

The weights are the left operand, so that they go from bytes to numbers in registers.
"""

import triton
import triton.language as tl

from attention.kernels.triton_code import INTERPRETED


@triton.jit
def _widened(codes, dtype: tl.constexpr, CONVERTS: tl.constexpr):
    """Whole numbers, or numbers of float8_e4m3 given as bytes, in the format ``dtype``, exactly.

    Where the hardware does not convert, bits of the byte make a number of float16, whose exponents are biased
    by 8 more. None of the codes is NaN.
    """
    if codes.dtype == tl.int8:
        if INTERPRETED:
            # It would take the whole number for the bits of a bfloat16.
            return codes.to(tl.float32).to(dtype)
        return codes.to(dtype)
    if CONVERTS:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = codes.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        numbers = bits.to(tl.float16, bitcast=True) * 256.0
    if dtype == tl.bfloat16:
        # Nothing is lost with the lower half, and rounding it away takes a slower instruction.
        bits = numbers.to(tl.float32).to(tl.uint32, bitcast=True)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return numbers.to(dtype)


@triton.jit
def _product(weights, rows):
    """``[..., N, K]`` by ``[..., K, M]``."""
    if INTERPRETED:
        # It keeps bfloat16 as whole numbers of the same bits, and would multiply these.
        weights = weights.to(tl.float32)
        rows = rows.to(tl.float32)
    return tl.dot(weights, rows, input_precision="ieee")


@triton.jit
def _finish(result, output, total, total_stride, bias, m, n, rows, outputs):
    """Rounds ``result`` ``[N, M]``, with bias, into the output or into its sum with what ``total`` holds."""
    inside = (n < outputs)[:, None] & (m < rows)[None, :]
    if bias is not None:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    if total is not None:
        place = total + m.to(tl.int64)[None, :] * total_stride + n[:, None]
        result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, result.to(total.dtype.element_ty), mask=inside)
    else:
        place = output + m.to(tl.int64)[None, :] * outputs + n[:, None]
        tl.store(place, result.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def multiply_few(
    output,
    total,
    total_stride,
    x,
    x_stride,
    codes,
    code_stride,
    scales,
    bias,
    rows,
    inputs,
    outputs,
    CONVERTS: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``BLOCK_N`` outputs of up to ``BLOCK_M`` rows, bound by reading the codes. The grid is the outputs.

    ``SLICES`` groups are multiplied at a time, each by warps of its own, whose sums are added at the end: so
    few outputs keep several warps busy, and no others need be waited for.

    Args:
        output: ``[M, N]``, contiguous; written if there is no ``total``.
        total: ``[M, N]``, what the product is added to, if that is asked for, and the stride of its rows.
        x: ``[M, K]`` and the stride of its rows.
        codes: ``[N, at least K]``, int8 or bytes of float8_e4m3, and the stride of its rows.
        scales: ``[G, N]``.
        bias: ``[N]``, if there is one.
        rows: M.
        inputs: K.
        outputs: N.
        CONVERTS: whether the hardware converts float8_e4m3.
        EVEN: whether K is a multiple of ``SLICES * GROUP``.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # Outputs beyond the last are computed as the last, and not stored.
    near = tl.minimum(n, outputs - 1)
    present = (m < rows)[None, None, :]
    slices = tl.arange(0, SLICES)
    k = slices[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at_codes = codes + (near.to(tl.int64) * code_stride)[None, :, None] + k[:, None, :]
    at_x = x + (m.to(tl.int64) * x_stride)[None, None, :] + k[:, :, None]
    at_scales = scales + slices[:, None] * outputs + near[None, :]
    sums = tl.zeros([SLICES, BLOCK_N, BLOCK_M], dtype=tl.float32)
    for begin in range(0, inputs, SLICES * GROUP):
        if EVEN:
            tile = tl.load(at_codes)
            acts = tl.load(at_x, mask=present, other=0.0)
            scale = tl.load(at_scales)
        else:
            inside = begin + k < inputs
            tile = tl.load(at_codes, mask=inside[:, None, :], other=0)
            acts = tl.load(at_x, mask=present & inside[:, :, None], other=0.0)
            scale = tl.load(at_scales, mask=(begin + slices * GROUP < inputs)[:, None], other=0.0)
        product = _product(_widened(tile, x.dtype.element_ty, CONVERTS), acts)
        sums += product * scale.to(tl.float32)[:, :, None]
        at_codes += SLICES * GROUP
        at_x += SLICES * GROUP
        at_scales += SLICES * outputs
    _finish(tl.sum(sums, axis=0), output, total, total_stride, bias, m, n, rows, outputs)


@triton.jit(do_not_specialize=["rows"])
def multiply_many(
    output,
    partial,
    total,
    total_stride,
    x,
    x_stride,
    codes,
    code_stride,
    scales,
    bias,
    rows,
    inputs,
    outputs,
    CONVERTS: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``BLOCK_N`` outputs of ``BLOCK_M`` rows, from one of ``SPLIT`` parts of the inputs.

    The grid is ``(tiles, SPLIT)``; parts are put together by ``combine``.

    Args:
        partial: float32 ``[SPLIT, M, N]``, each part's sums, if there are several.
        EVEN: whether K is a multiple of ``GROUP``.

    The others are those of ``multiply_few``.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    # Neighbors in time share codes and rows.
    item = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(item // tiles_n, item % tiles_n, tiles_m, tiles_n, 8)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # What lies beyond the last output or row is computed as the last, and not stored.
    near_m = tl.minimum(m, rows - 1).to(tl.int64)
    near_n = tl.minimum(n, outputs - 1)
    k = tl.arange(0, GROUP)
    part = tl.program_id(1)
    groups = tl.cdiv(tl.cdiv(inputs, GROUP), SPLIT)
    first = part * groups
    at_codes = codes + (near_n.to(tl.int64) * code_stride)[:, None] + (first * GROUP + k)[None, :]
    at_x = x + (near_m * x_stride)[None, :] + (first * GROUP + k)[:, None]
    at_scales = scales + first * outputs + near_n
    sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for begin in range(first * GROUP, tl.minimum(inputs, (first + groups) * GROUP), GROUP):
        if EVEN:
            tile = tl.load(at_codes)
            acts = tl.load(at_x)
        else:
            inside = begin + k < inputs
            tile = tl.load(at_codes, mask=inside[None, :], other=0)
            acts = tl.load(at_x, mask=inside[:, None], other=0.0)
        scale = tl.load(at_scales)
        product = _product(_widened(tile, x.dtype.element_ty, CONVERTS), acts)
        sums += product * scale.to(tl.float32)[:, None]
        at_codes += GROUP
        at_x += GROUP
        at_scales += outputs
    if SPLIT > 1:
        place = partial + (part.to(tl.int64) * rows + m)[None, :] * outputs + n[:, None]
        tl.store(place, sums, mask=(n < outputs)[:, None] & (m < rows)[None, :])
    else:
        _finish(sums, output, total, total_stride, bias, m, n, rows, outputs)


@triton.jit(do_not_specialize=["rows"])
def combine(
    output,
    partial,
    total,
    total_stride,
    bias,
    rows,
    outputs,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the parts of ``multiply_many``, in order, and rounds. The grid is ``(rows, blocks of outputs)``.

    Arguments are those of ``multiply_many``.
    """
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        place = (part * rows + row).to(tl.int64) * outputs + n
        sums += tl.load(partial + place, mask=n < outputs, other=0.0)
    m = row + tl.arange(0, 1)
    _finish(sums[:, None], output, total, total_stride, bias, m, n, rows, outputs)
