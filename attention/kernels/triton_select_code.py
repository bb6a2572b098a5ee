"""The pages that ``topk`` chooses, as Triton programs that read digests where they lie; see ``TopK``.

A row's pages between the first and the recent ones are cut into *parts*, as many for every row, each a
program of its own; those beyond a row's end return at once. ``bound`` finds what a query head's product with
any key of a page is at most, ``score`` makes one score of the bounds of the heads that share a key head, and
``choose`` finds the best by bisection, which takes any number of pages and needs no sorting.

All is computed in double precision, in which products of two floats are exact, and a score is then rounded to
a float, so that the order of sums does not show.
"""

import triton
import triton.language as tl

from attention.kernels import triton_plan
from attention.kernels.triton_code import _widened

COVER_FIELDS = tl.constexpr(triton_plan.COVER_FIELDS)

# Scores as whole numbers: what is no number comes first, and after all scores what is not there.
FIRST = tl.constexpr(0x7FFFFFFF)
LAST = tl.constexpr(-0x80000000)


@triton.jit
def _between(
    position,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The pages that a row chooses from: the first and their number; the first recent page.

    Last, the first position in the layer's own window.
    """
    recent = tl.maximum(position // PAGE_SIZE - RECENT_PAGES + 1, 0)
    least = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else position * 0
    begin = tl.maximum(least // PAGE_SIZE, SINK_PAGES)
    return begin, tl.maximum(recent - begin, 0), recent, least


@triton.jit
def _part(count, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """This program's part of ``count`` pages, from and to, and the pages of any part.

    Nothing where all are chosen, which takes no scores.
    """
    size = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), BLOCK) * BLOCK
    begin = tl.program_id(1) * size
    end = tl.minimum(begin + size, count)
    return begin, tl.where(count > CHOICES, end, begin), size


@triton.jit(do_not_specialize=["width"])
def bound(
    bounds,
    most,
    sums,
    query,
    query_row_stride,
    query_head_stride,
    query_stride,
    digest,
    table,
    rows,
    owners,
    positions,
    width,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    CHOICES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Bounds of one part of a row's pages, for the query heads that share one key head.

    The grid is ``(KV_HEADS, parts, N)``.

    Args:
        bounds: float64 ``[N, KV_HEADS * GROUP, width]``, by place among the pages that the row chooses from.
        most: float64 ``[N, KV_HEADS * GROUP, parts]``, the largest of a part's.
        sums: the same, of exponentials, less the largest.
        query: ``[T, KV_HEADS * GROUP, HEAD_SIZE]``, and its strides.
        digest: ``[pages, 2, KV_HEADS, HEAD_SIZE]``, contiguous, float8_e4m3 as bytes.
        table: int32 ``[B, width]``, the page table, contiguous.
        rows: int64 ``[N]``, the query rows that choose.
        owners: int64 ``[T]``, the rows of the page table.
        positions: int64 ``[T]``.
    """
    head = tl.program_id(0)
    entry = tl.program_id(2).to(tl.int64)
    row = tl.load(rows + entry)
    position = tl.load(positions + row).to(tl.int32)
    begin, count, _, _ = _between(position, PAGE_SIZE, SINK_PAGES, RECENT_PAGES, WINDOW)
    first, end, _ = _part(count, CHOICES, BLOCK_P)
    if first >= end:
        return
    pages = table + tl.load(owners + row).to(tl.int64) * width + begin
    at_d = tl.arange(0, BLOCK_D)
    at_g = tl.arange(0, BLOCK_G)
    inside_d = at_d < HEAD_SIZE
    own = query + row * query_row_stride + head * GROUP * query_head_stride + at_d * query_stride
    line = (entry * KV_HEADS + head) * GROUP + at_g
    scale = tl.full([BLOCK_P], SCALE, tl.float64)
    highest = tl.full([BLOCK_G, BLOCK_P], float("-inf"), tl.float64)
    total = tl.zeros([BLOCK_G, BLOCK_P], dtype=tl.float64)
    for index in range(first, end, BLOCK_P):
        place = index + tl.arange(0, BLOCK_P)
        inside = place < end
        page = tl.load(pages + place, mask=inside, other=0)
        there = page != 0
        low = digest + ((page.to(tl.int64) * 2 * KV_HEADS + head) * HEAD_SIZE)[:, None] + at_d[None, :]
        mask = there[:, None] & inside_d[None, :]
        smallest = tl.load(low, mask=mask, other=0)
        largest = tl.load(low + KV_HEADS * HEAD_SIZE, mask=mask, other=0)
        smallest = _widened(smallest, tl.zeros([1], dtype=tl.float32)).to(tl.float32).to(tl.float64)
        largest = _widened(largest, tl.zeros([1], dtype=tl.float32)).to(tl.float32).to(tl.float64)
        found = tl.full([BLOCK_G, BLOCK_P], float("-inf"), tl.float64)
        for shared in range(GROUP):
            numbers = tl.load(own + shared * query_head_stride, mask=inside_d, other=0)
            numbers = numbers.to(tl.float32).to(tl.float64)
            # Both products, though one is with zero: what is no number shows, in keys and queries alike.
            negative = tl.where(numbers > 0, 0.0, numbers)
            positive = tl.where(numbers < 0, 0.0, numbers)
            sizes = tl.sum(smallest * negative[None, :] + largest * positive[None, :], axis=1) * scale
            sizes = tl.where(there, sizes, float("-inf"))
            found = tl.where((at_g == shared)[:, None], sizes[None, :], found)
        tl.store(
            bounds + (line * width)[:, None] + place[None, :],
            found,
            mask=(at_g < GROUP)[:, None] & inside[None, :],
        )
        higher = tl.maximum(highest, found)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.exp(found - base)
        highest = higher
    top = tl.max(highest, axis=1)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(total * tl.exp(highest - base[:, None]), axis=1)
    at = line * tl.num_programs(1) + tl.program_id(1)
    tl.store(most + at, top, mask=at_g < GROUP)
    tl.store(sums + at, total, mask=at_g < GROUP)


@triton.jit(do_not_specialize=["width"])
def score(
    scores,
    bounds,
    most,
    sums,
    rows,
    positions,
    width,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    CHOICES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Scores of one part of a row's pages, for one key head.

    With its bounds as logits, softmax over all of the row's parts gives a page its share of each query head's
    attention; the score is the logarithm of their sum. The grid and ``BLOCK_P`` are those of ``bound``.

    Args:
        scores: int32 ``[N, KV_HEADS, width]``, in the order of the scores.
        bounds: see ``bound``, as all others.
    """
    head = tl.program_id(0)
    entry = tl.program_id(2).to(tl.int64)
    position = tl.load(positions + tl.load(rows + entry)).to(tl.int32)
    _, count, _, _ = _between(position, PAGE_SIZE, SINK_PAGES, RECENT_PAGES, WINDOW)
    first, end, size = _part(count, CHOICES, BLOCK_P)
    if first >= end:
        return
    at_g = tl.arange(0, BLOCK_G)
    inside_g = at_g < GROUP
    line = (entry * KV_HEADS + head) * GROUP + at_g
    parts = tl.cdiv(count, size)
    highest = tl.full([BLOCK_G], float("-inf"), tl.float64)
    total = tl.zeros([BLOCK_G], dtype=tl.float64)
    for index in range(0, parts, BLOCK_S):
        part = index + tl.arange(0, BLOCK_S)
        at = (line * tl.num_programs(1))[:, None] + part[None, :]
        mask = inside_g[:, None] & (part < parts)[None, :]
        top = tl.load(most + at, mask=mask, other=float("-inf"))
        weight = tl.load(sums + at, mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(top, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.sum(weight * tl.exp(top - base[:, None]), axis=1)
        total = total * tl.exp(highest - base) + weight
        highest = higher
    norm = highest + tl.log(total)
    for index in range(first, end, BLOCK_N):
        place = index + tl.arange(0, BLOCK_N)
        inside = place < end
        mask = inside_g[:, None] & inside[None, :]
        found = tl.load(bounds + (line * width)[:, None] + place[None, :], mask=mask, other=0.0)
        shares = tl.where(mask, found - norm[:, None], float("-inf"))
        top = tl.max(shares, axis=0)
        base = tl.where(top == float("-inf"), 0.0, top)
        result = (base + tl.log(tl.sum(tl.exp(shares - base[None, :]), axis=0))).to(tl.float32)
        result = tl.where(result == 0, 0.0, result)  # there is but one zero
        bits = result.to(tl.int32, bitcast=True)
        bits = tl.where(result != result, FIRST, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        tl.store(scores + (entry * KV_HEADS + head) * width + place, bits, mask=inside)


@triton.jit
def _least_chosen(scores, count, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Two scores: every page above the second is chosen, and of those from the first to it the earliest.

    Last, how many of the latter, so that all are ``CHOICES``. Bisection ends between two scores, or at one
    that several pages have. There must be more pages than ``CHOICES``.
    """
    lowest = tl.full([BLOCK], FIRST, tl.int32)
    highest = tl.full([BLOCK], LAST, tl.int32)
    for index in range(0, count, BLOCK):
        place = index + tl.arange(0, BLOCK)
        lowest = tl.minimum(lowest, tl.load(scores + place, mask=place < count, other=FIRST))
        highest = tl.maximum(highest, tl.load(scores + place, mask=place < count, other=LAST))
    low = tl.min(lowest, axis=0).to(tl.int64)
    high = tl.max(highest, axis=0).to(tl.int64)
    above = count * 0  # pages above `high`: fewer than are chosen
    from_low = count  # pages from `low` on: as many or more
    while (low < high) & (from_low != CHOICES):
        middle = high - (high - low) // 2
        least = middle.to(tl.int32)
        more = tl.zeros([BLOCK], dtype=tl.int32)
        for index in range(0, count, BLOCK):
            place = index + tl.arange(0, BLOCK)
            more += (tl.load(scores + place, mask=place < count, other=LAST) >= least).to(tl.int32)
        found = tl.sum(more, axis=0)
        enough = found >= CHOICES
        low = tl.where(enough, middle, low)
        from_low = tl.where(enough, found, from_low)
        high = tl.where(enough, high, middle - 1)
        above = tl.where(enough, above, found)
    return low.to(tl.int32), high.to(tl.int32), CHOICES - above


@triton.jit(do_not_specialize=["width"])
def choose(
    covers,
    scores,
    rows,
    positions,
    width,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SINK_PAGES: tl.constexpr,
    RECENT_PAGES: tl.constexpr,
    CHOICES: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What one row sees for one key head. The grid is ``(KV_HEADS, N)``.

    Args:
        covers: int32 ``[N, KV_HEADS, COVER_FIELDS + 2 * RANGES]``, see ``triton_plan.compact``; the ranges
            are the first pages, the chosen ones, the recent ones, or all that the row may see.
        scores: see ``score``, as all others.
    """
    head = tl.program_id(0)
    entry = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + tl.load(rows + entry)).to(tl.int32)
    begin, count, recent, least = _between(position, PAGE_SIZE, SINK_PAGES, RECENT_PAGES, WINDOW)
    own = scores + (entry * KV_HEADS + head) * width
    cover = covers + (entry * KV_HEADS + head) * (COVER_FIELDS + 2 * RANGES)
    starts = cover + COVER_FIELDS
    shifts = starts + RANGES
    slot = tl.arange(0, RANGES)
    if count <= CHOICES:
        tokens = position + 1 - least
        tl.store(starts + slot, tl.where(slot == 0, 0, tokens))
        tl.store(shifts + slot, tl.where(slot == 0, least, 0))
    else:
        before = tl.maximum(SINK_PAGES * PAGE_SIZE - least, 0)  # tokens of the first pages
        cut = count * 0  # tokens of a chosen page that lie behind the window
        if CHOICES > 0:
            low, high, share = _least_chosen(own, count, CHOICES, BLOCK)
            if WINDOW > 0:
                # Only the first page of all can lie across the window's edge.
                cut = tl.where(tl.load(own) >= low, tl.maximum(least - begin * PAGE_SIZE, 0), 0)
            surely = count * 0
            perhaps = count * 0
            for index in range(0, count, BLOCK):
                place = index + tl.arange(0, BLOCK)
                found = tl.load(own + place, mask=place < count, other=LAST)
                sure = (found > high).to(tl.int32)
                maybe = ((found >= low) & (found <= high)).to(tl.int32)
                # Two counts in one number.
                counts = tl.cumsum(sure + (maybe << 16), axis=0)
                sure_so_far = surely + (counts & 0xFFFF)
                maybe_so_far = perhaps + (counts >> 16)
                chosen = (sure > 0) | ((maybe > 0) & (maybe_so_far <= share))
                nth = sure_so_far + tl.minimum(maybe_so_far, share)
                start = before + (nth - 1) * PAGE_SIZE - tl.where(nth > 1, cut, 0)
                position_of = tl.maximum((begin + place) * PAGE_SIZE, least)
                tl.store(shifts + nth, position_of - start, mask=chosen)
                surely += tl.sum(sure, axis=0)
                perhaps += tl.sum(maybe, axis=0)
        start = before + tl.maximum(slot - 1, 0) * PAGE_SIZE - tl.where(slot > 1, cut, 0)
        last = before + CHOICES * PAGE_SIZE - cut
        tokens = last + position + 1 - recent * PAGE_SIZE
        start = tl.where(slot == 0, 0, tl.where(slot > CHOICES + 1, tokens, start))
        shift = tl.where(slot == 0, least, tl.where(slot == CHOICES + 1, recent * PAGE_SIZE - last, 0))
        tl.store(starts + slot, start)
        tl.store(shifts + slot, shift, mask=(slot == 0) | (slot > CHOICES))
    tl.store(cover, tokens)
    tl.store(cover + 1, 0)  # nothing is turned
