"""How a batch is cut for the Triton programs of ``triton_code``: blocks of rows, their covers, their parts.

Plans are made on the host, while the device computes the step before; for a captured step, whose numbers the
host does not know, on the device.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from attention.batch import AttentionBatch
from attention.kernels.base import power_of_two, spans_within
from attention.kernels.plan import split
from attention.patterns.base import Pattern
from attention.step import Array, DeviceBatch
from attention.transfer import to_device

# Columns of ``Blocks.blocks`` and ``Blocks.items``, and numbers before the ranges of a cover.
BLOCK_FIELDS = 6
ITEM_FIELDS = 3
COVER_FIELDS = 2

LOG2_E = 1.4426950408889634

# Programs for each multiprocessor in a captured step, where covers are cut without knowing their lengths:
# enough to read memory at full speed, and few, since the parts of a row are combined one after another.
_CAPTURED_PROGRAMS = 2


class Tile(NamedTuple):
    """The work of one program at a time.

    Attributes:
        pairs: (row, query head) pairs that share a KV head; a power of two.
        tokens: of the cover; a power of two.
        warps: of 32 threads each.
        stages: tiles of keys and values in flight.
        part: the least number of tokens that are worth a program of their own.
        programs: per multiprocessor, in all; beyond so many, covers are not cut any further.
    """

    pairs: int
    tokens: int
    warps: int
    stages: int
    part: int
    programs: int


class Heads(NamedTuple):
    """KV heads, and the number of query heads that share one."""

    kv_heads: int
    group: int

    def columns(self, tile: Tile) -> int:
        """Programs for each part of a block: one per KV head, unless its group is larger than a tile."""
        return self.kv_heads * -(-self.group // tile.pairs)


class Blocks(NamedTuple):
    """Work for one launch: blocks of rows of one sequence each, and parts of their covers.

    Attributes:
        tile: the work of one program at a time.
        blocks: int32 ``[N, 6]`` on the device: first row, number of rows, sequence, the tokens of the cover
            that all rows see (from, to), first item.
        items: int32 ``[I, 3]`` on the device: block, part, number of parts.
        ranges: int32 ``[T, K, 2]`` on the device, each row's ranges; ``None`` if every block is one row.
        parts: some block has several parts.
        straight: every cover is one range from position 0 on.
    """

    tile: Tile
    blocks: torch.Tensor
    items: torch.Tensor
    ranges: torch.Tensor | None
    parts: bool
    straight: bool


def plan_rows(
    batch: AttentionBatch,
    window: int | None,
    pattern: Pattern,
    heads: Heads,
    single: Tile,
    chunked: Tile,
    processors: int,
) -> list[tuple[Blocks, torch.Tensor]]:
    """All query rows but those that select by content, with the blocks' covers, see ``compact``.

    Args:
        batch: the step's batch.
        window: the layer's own sliding window, or ``None``.
        pattern: which cached tokens a query may see.
        heads: the layer's heads.
        single: for single rows.
        chunked: for chunks.
        processors: multiprocessors of the device.
    """
    single_rows, chunks = split(batch, pattern)
    spans = batch.visible.spans(pattern, window)
    device = batch.device.page_table.device
    planned = []
    if single_rows:
        rows = np.asarray(single_rows)
        sequences = batch.host.owners[rows]
        covers = compact(torch.from_numpy(spans[rows])[:, None], pattern.rerotated)
        fields = np.stack([rows, np.ones_like(rows), sequences], axis=1)
        full = np.zeros((len(rows), 2), dtype=np.int64)
        planned.append(_blocks(single, fields, full, covers, None, heads, processors, device))
    if chunks:
        fields, full, hulls = _chunks(chunks, spans, max(1, chunked.pairs // heads.group))
        covers = compact(torch.from_numpy(hulls)[:, None], pattern.rerotated)
        ranges = to_device(torch.from_numpy(spans.astype(np.int32)), device)
        planned.append(_blocks(chunked, fields, full, covers, ranges, heads, processors, device))
    return planned


def plan_selecting(batch: AttentionBatch, rows: Array, heads: Heads, tile: Tile, processors: int) -> Blocks:
    """Rows that select by content, int64 ``[N]`` on the host, each a block of its own.

    Only the device knows how much they select, so all covers are cut into equally many parts.
    """
    device = batch.device.page_table.device
    programs, longest = processors * tile.programs, max(batch.host.seq_lens)
    owners = torch.from_numpy(batch.host.owners[rows])
    planned = _evenly(torch.from_numpy(rows), owners, heads, tile, programs, longest)
    return planned._replace(blocks=to_device(planned.blocks, device), items=to_device(planned.items, device))


def plan_captured(
    batch: DeviceBatch,
    window: int | None,
    pattern: Pattern,
    heads: Heads,
    tile: Tile,
    processors: int,
) -> tuple[Blocks, torch.Tensor]:
    """All rows of a captured step, each a block of its own, with their covers.

    Args:
        batch: decode rows.
        window: the layer's own sliding window, or ``None``.
        pattern: which cached tokens a query may see, by position.
        heads: the layer's heads.
        tile: the work of one program at a time.
        processors: multiprocessors of the device.
    """
    positions = batch.positions
    spans = spans_within(pattern.spans(positions), positions, window)
    straight = pattern.dense and window is None
    return captured_blocks(batch, heads, tile, processors)._replace(straight=straight), compact(
        spans[:, None], pattern.rerotated
    )


def captured_blocks(
    batch: DeviceBatch, heads: Heads, tile: Tile, processors: int, most_pages: int | None = None
) -> Blocks:
    """All rows of a captured step, each a block of its own, without their covers.

    ``most_pages``: the most pages that a row sees; ``None`` if there is no bound.
    """
    rows = torch.arange(len(batch.positions), device=batch.positions.device)
    width = batch.page_table.shape[1]
    longest = (width if most_pages is None else min(width, most_pages)) * batch.page_size
    return _evenly(rows, batch.owners, heads, tile, processors * _CAPTURED_PROGRAMS, longest)


def _evenly(
    rows: torch.Tensor, owners: torch.Tensor, heads: Heads, tile: Tile, programs: int, longest: int
) -> Blocks:
    """Single rows ``[N]``, with all covers cut into equally many parts."""
    parts = max(1, min(programs // (len(rows) * heads.columns(tile)), -(-longest // tile.part)))
    at = torch.arange(len(rows), device=rows.device)
    zero = torch.zeros_like(at)
    blocks = torch.stack([rows, zero + 1, owners, zero, zero, at * parts], dim=1).int()
    part = torch.arange(parts, device=rows.device).repeat(len(rows))
    block = at[:, None].expand(-1, parts).flatten()
    items = torch.stack([block, part, torch.full_like(part, parts)], dim=1).int()
    return Blocks(tile, blocks, items, None, parts > 1, False)


def compact(spans: torch.Tensor, rerotated: int, least: int = 1) -> torch.Tensor:
    """Covers, for programs that number their tokens without the gaps.

    Args:
        spans: ``[N, heads, K, 2]``, disjoint ranges in ascending order, except for empty ones.
        rerotated: see ``Pattern.rerotated``.
        least: number of ranges to make room for, a power of two. Fewer sizes mean fewer programs to compile.

    Returns:
        int32 ``[N, heads, 2 + 2 * R]``, ``R`` being ``K`` rounded up to a power of two: the number of tokens;
        how many of them are among the first ``rerotated``; the number of each range's first token; what to
        add to a token's number for its position.
    """
    begins, ends = spans.unbind(-1)
    lengths = (ends - begins).clamp(min=0)
    stops = lengths.cumsum(dim=-1)
    near = (rerotated - begins).clamp(min=0).minimum(lengths).sum(dim=-1, keepdim=True)
    starts = stops - lengths
    room = max(least, power_of_two(spans.shape[2])) - spans.shape[2]
    # Unused ranges start beyond every token's number, so that no search ends there.
    beyond = stops[..., -1:].expand(-1, -1, room)
    shifts = torch.nn.functional.pad(begins - starts, (0, room))
    return torch.cat([stops[..., -1:], near, starts, beyond, shifts], dim=-1).int()


def _chunks(
    chunks: list[tuple[int, int, int]], spans: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of at most ``most`` rows, whose rows see about the same tokens.

    Args:
        chunks: sequence, first row, row after the last.
        spans: ``[T, K, 2]``, each row's ranges.
        most: rows of a block.

    Returns:
        First row, number of rows and sequence of each block, ``[N, 3]``; which tokens of its cover are seen
        by all rows, ``[N, 2]``; the cover's ranges, ``[N, K, 2]``.
    """
    begins, ends = spans[..., 0], spans[..., 1]
    some = begins < ends
    # If a range does not touch that of the row before, their union has a gap: a block ends there.
    last = np.maximum.accumulate(np.where(some, np.arange(len(spans))[:, None], -1), axis=0)[:-1]
    before = [np.take_along_axis(numbers, last.clip(0), axis=0) for numbers in (begins, ends)]
    apart = (begins[1:] > before[1]) | (before[0] > ends[1:])
    jumps = np.flatnonzero((apart & some[1:] & (last >= 0)).any(axis=1)) + 1
    fields = []
    for sequence, start, stop in chunks:
        inside = jumps[np.searchsorted(jumps, start, side="right") : np.searchsorted(jumps, stop)]
        edges = [start, *inside.tolist(), stop]
        for low, high in pairwise(edges):
            fields += [(row, min(most, high - row), sequence) for row in range(low, high, most)]
    blocks = np.asarray(fields)
    # Each block's rows, then the rows up to the next block, which are dropped.
    cuts = np.stack([blocks[:, 0], blocks[:, 0] + blocks[:, 1]], axis=1).ravel()
    cuts = cuts[:-1] if cuts[-1] == len(spans) else cuts

    def over(reduce: np.ufunc, numbers: np.ndarray) -> np.ndarray:
        return reduce.reduceat(numbers, cuts, axis=0)[::2]

    nothing = np.iinfo(np.int32).max
    lows = over(np.minimum, np.where(some, begins, nothing))
    highs = over(np.maximum, np.where(some, ends, 0))
    order = lows.argsort(axis=1, kind="stable")
    lows, highs = np.take_along_axis(lows, order, axis=1), np.take_along_axis(highs, order, axis=1)
    # Ranges of different rows may overlap: each begins where those before it end, if not later.
    highs = np.maximum.accumulate(highs, axis=1)
    lows[:, 1:] = np.maximum(lows[:, 1:], highs[:, :-1])
    lows = np.minimum(lows, highs)

    all_from, all_to = over(np.maximum, begins), over(np.minimum, ends)
    widest = (all_to - all_from).argmax(axis=1)[:, None]
    common = [np.take_along_axis(numbers, widest, axis=1) for numbers in (all_from, all_to)]
    full = np.stack([(at - lows).clip(0, highs - lows).sum(axis=1) for at in common], axis=1)
    return blocks, full, np.stack([lows, highs], axis=-1)


def _blocks(
    tile: Tile,
    fields: np.ndarray,
    full: np.ndarray,
    covers: torch.Tensor,
    ranges: torch.Tensor | None,
    heads: Heads,
    processors: int,
    device: torch.device,
) -> tuple[Blocks, torch.Tensor]:
    """Cuts covers into parts of about the same length, as far as that keeps the device busier."""
    # The longest first, so that no long one starts last.
    order = np.argsort(-covers[:, 0, 0].numpy(), kind="stable")
    fields, full, covers = fields[order], full[order], covers[torch.from_numpy(order)]
    tokens = covers[:, 0, 0].numpy().astype(np.int64)
    even = -(-int(tokens.sum()) * heads.columns(tile) // (processors * tile.programs))
    size = max(tile.part, even)
    parts = np.maximum(1, -(-tokens // size))
    firsts = parts.cumsum() - parts
    which = np.repeat(np.arange(len(parts)), parts)
    items = np.stack([which, np.arange(len(which)) - firsts[which], parts[which]], axis=1)
    blocks = np.concatenate([fields, full, firsts[:, None]], axis=1)
    straight = covers.shape[2] == COVER_FIELDS + 2 and not bool(covers[..., -1].any())

    device_fields, device_items = (
        to_device(torch.from_numpy(numbers.astype(np.int32)), device) for numbers in (blocks, items)
    )
    planned = Blocks(tile, device_fields, device_items, ranges, bool((parts > 1).any()), straight)
    return planned, to_device(covers, device)
