"""The Triton program that combines the parts of a block, where covers are cut; see ``triton_code``."""

import triton
import triton.language as tl

from attention.kernels import triton_plan

BLOCK_FIELDS = tl.constexpr(triton_plan.BLOCK_FIELDS)
ITEM_FIELDS = tl.constexpr(triton_plan.ITEM_FIELDS)


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
    """Combines the parts of one block, for one KV head and ``BLOCK_M`` of its pairs; see ``attend``.

    The grid is ``(blocks, KV_HEADS * tiles of pairs)``. Each part is weighted by its denominator.
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
