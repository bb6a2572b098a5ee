"""The program of ``triton_digest``: what ``topk`` remembers of complete pages."""

import triton
import triton.language as tl

HIGHEST = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-0x80000000)


@triton.jit
def _in_order(codes, LARGEST: tl.constexpr):
    """A number's bits as a whole number of the same order, and back again."""
    return codes ^ ((codes >> 31) & LARGEST)


@triton.jit
def digest_pages(
    digest,
    keys,
    slots,
    positions,
    NUMBERS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The digest of the page that one row's key completes, if it does; ``BLOCK`` numbers of it.

    The grid is ``(T, tiles of NUMBERS)``. Compares bits, as whole numbers, so that all formats are the same.

    Args:
        digest: ``[pages, 2, NUMBERS]``, whole numbers of the keys' bits: their smallest and their largest.
        keys: ``[pages, PAGE_SIZE, NUMBERS]``, likewise, both contiguous.
        slots: int64 ``[T]``.
        positions: int64 ``[T]``.
        LARGEST: the largest whole number of so many bits.
        LARGEST_NUMBER: the bits of the largest number; what is beyond them is none.
    """
    row = tl.program_id(0)
    if (tl.load(positions + row) + 1) % PAGE_SIZE != 0:
        return
    page = tl.load(slots + row).to(tl.int64) // PAGE_SIZE
    if page == 0:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < NUMBERS
    smallest = tl.full([BLOCK], HIGHEST, tl.int32)
    largest = tl.full([BLOCK], LOWEST, tl.int32)
    for first in range(0, PAGE_SIZE, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        there = token < PAGE_SIZE
        place = ((page * PAGE_SIZE + token) * NUMBERS)[:, None] + at[None, :]
        codes = tl.load(keys + place, mask=there[:, None] & inside[None, :], other=0).to(tl.int32)
        codes = _in_order(codes, LARGEST)
        smallest = tl.minimum(smallest, tl.min(tl.where(there[:, None], codes, HIGHEST), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(there[:, None], codes, LOWEST), axis=0))
    none = (largest > LARGEST_NUMBER) | (smallest < -1 - LARGEST_NUMBER)
    whole = digest.dtype.element_ty
    to = digest + page * 2 * NUMBERS + at
    tl.store(to, tl.where(none, LARGEST, _in_order(smallest, LARGEST)).to(whole), mask=inside)
    tl.store(to + NUMBERS, tl.where(none, LARGEST, _in_order(largest, LARGEST)).to(whole), mask=inside)
