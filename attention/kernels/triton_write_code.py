"""The program of ``triton_write``, which writes keys and values to their slots in the paged cache.

Numbers beyond the finite range of the cache's dtype become NaN, as in ``attention.dtypes.cast``. Rounding to
nearest even is done with integers for dtypes that not every GPU knows or rounds so.
"""

import triton
import triton.language as tl


@triton.jit
def _bfloat16(numbers, CAN_OVERFLOW: tl.constexpr):
    """Float32 to bfloat16, which is its first half."""
    bits = numbers.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Half of the last digit that stays is added, or a little less where that is even.
    code = (size + 0x7FFF + ((size >> 16) & 1)) >> 16
    lost = size > 0x7F800000
    if CAN_OVERFLOW:
        lost |= code >= 0x7F80
    code = tl.where(lost, 0x7FC0, code) | ((bits >> 16) & 0x8000)
    return code.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _float8_e4m3(numbers):
    """Float32 to the bytes of float8_e4m3: a sign, 4 bits of exponent and 3 of fraction."""
    bits = numbers.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # As above; exponents are biased by 7, not by 127.
    code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 its numbers are multiples of 2^-9, and so are float32's from 2^14 on: adding that rounds, and
    # the sum's last bits say which multiple.
    small = (tl.abs(numbers) + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(size < 0x3C800000, small, code) | ((bits >> 24) & 0x80)
    # Larger than 464, halfway to the next number if there were more exponents, or NaN.
    return tl.where(size > 0x43E80000, 0x7F, code).to(tl.uint8)


@triton.jit
def _cast(numbers, like: tl.constexpr, CAN_OVERFLOW: tl.constexpr):
    """Numbers in the dtype ``like``; uint8 stands for float8_e4m3."""
    if numbers.dtype != like:
        if numbers.dtype == tl.bfloat16:
            # By bits: the interpreter cannot convert subnormal numbers.
            numbers = (numbers.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        numbers = numbers.to(tl.float32)
        if like == tl.uint8:
            numbers = _float8_e4m3(numbers)
        elif like == tl.bfloat16:
            numbers = _bfloat16(numbers, CAN_OVERFLOW)
        else:
            numbers = numbers.to(like)
            if CAN_OVERFLOW:
                numbers = tl.where(tl.abs(numbers) == float("inf"), float("nan"), numbers)
    return numbers


@triton.jit
def _move(
    numbers,
    row,
    row_stride,
    head_stride,
    stride,
    pages,
    slot,
    slot_stride,
    page_head_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    CAN_OVERFLOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some heads of one row."""
    head = (tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None].to(tl.int64)
    at = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < HEADS) & (at < SIZE)
    found = tl.load(numbers + row * row_stride + head * head_stride + at * stride, mask=mask, other=0.0)
    place = pages + slot * slot_stride + head * page_head_stride + at
    tl.store(place, _cast(found, pages.dtype.element_ty, CAN_OVERFLOW), mask=mask)


@triton.jit
def write(
    key,
    key_row_stride,
    key_head_stride,
    key_stride,
    value,
    value_row_stride,
    value_head_stride,
    value_stride,
    slots,
    keys,
    key_slot_stride,
    key_page_head_stride,
    values,
    value_slot_stride,
    value_page_head_stride,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    CAN_OVERFLOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The grid is ``(T, 2, tiles of BLOCK_H heads)``: a row's keys, and its values."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if tl.program_id(1) == 0:
        _move(
            key,
            row,
            key_row_stride,
            key_head_stride,
            key_stride,
            keys,
            slot,
            key_slot_stride,
            key_page_head_stride,
            HEADS,
            HEAD_SIZE,
            CAN_OVERFLOW,
            BLOCK_H,
            BLOCK_D,
        )
    else:
        _move(
            value,
            row,
            value_row_stride,
            value_head_stride,
            value_stride,
            values,
            slot,
            value_slot_stride,
            value_page_head_stride,
            HEADS,
            VALUE_SIZE,
            CAN_OVERFLOW,
            BLOCK_H,
            BLOCK_V,
        )
