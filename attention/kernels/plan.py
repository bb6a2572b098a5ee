"""Plans what to gather from the cache for a batch, from ranges: cost in proportion to visible tokens.

Single rows (decode rows, and rows that select by content) form padded groups of similar length, each row with
its own keys. Consecutive rows of one sequence (chunks of prompts) form blocks that gather the union of their
rows' ranges, cut so that rows far apart need not share one.

Ranges, groups and blocks are computed on the host, while the device computes the step before.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from attention.batch import AttentionBatch
from attention.kernels.base import locate, visibility
from attention.patterns.base import ContentPattern, Pattern
from attention.step import Array
from attention.transfer import to_device

# Up to this many tokens, a launch of its own costs more than the padding it saves.
_SHORT = 128

# Blocks begin at multiples of this position, so that the blocks and segments of patterns fall into them.
_BLOCK_ROWS = 64

# The cost of gathering a key, its part of a launch included, in rows that attend to it.
_KEY_COST = 16

Span = tuple[int, int]


class Rows(NamedTuple):
    """``N`` items of one query row each; each reads ``L`` cached tokens, padding included.

    If each KV head has its own selection, an item is a row and a KV head, ``row * heads + head``, and
    so are the slots; otherwise ``heads`` is 1.
    """

    heads: int
    items: torch.Tensor  # [N]
    slots: torch.Tensor  # [N, L]
    mask: torch.Tensor | None  # [N, 1, 1, L], added to the logits
    near: torch.Tensor | None  # [N, S], which of the first S keys take rerotated queries


class Block(NamedTuple):
    """Consecutive query rows of one sequence, which read the same ``L`` cached tokens."""

    start: int
    stop: int
    slots: torch.Tensor  # [L]
    mask: torch.Tensor | None  # [stop - start, L], added to the logits; None: causal, square
    near: int  # how many of the first keys take rerotated queries


class Plan(NamedTuple):
    """All query rows of a batch but those that select by content."""

    rows: list[Rows]
    blocks: list[Block]


def plan_batch(batch: AttentionBatch, window: int | None, pattern: Pattern, dtype: torch.dtype) -> Plan:
    """The plan for layers with this window of their own under a pattern; masks are in ``dtype``."""
    single, chunks = split(batch, pattern)
    blocks = [block for chunk in chunks for block in plan_chunk(batch, *chunk, window, pattern, dtype)]
    return Plan(plan_single(batch, single, window, pattern, dtype), blocks)


def split(batch: AttentionBatch, pattern: Pattern) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Single query rows, and longer runs as sequence, first row and the row after the last.

    Rows that select by content are in neither.
    """
    edges = batch.host.query_starts
    runs = [(b, start, stop) for b, (start, stop) in enumerate(pairwise(edges))]
    if isinstance(pattern, ContentPattern):
        selecting = set(batch.visible.selecting(pattern).tolist())
        runs = [run for b, start, stop in runs for run in _without(selecting, b, start, stop)]
    single = [start for _, start, stop in runs if stop - start == 1]
    return single, [run for run in runs if run[2] - run[1] > 1]


def _without(rows: set[int], b: int, start: int, stop: int) -> list[tuple[int, int, int]]:
    """The runs that are left of ``start`` to ``stop`` without ``rows``."""
    cuts = [start - 1, *sorted(rows.intersection(range(start, stop))), stop]
    return [(b, first + 1, last) for first, last in pairwise(cuts) if first + 1 < last]


def plan_single(
    batch: AttentionBatch, single: list[int], window: int | None, pattern: Pattern, dtype: torch.dtype
) -> list[Rows]:
    """Groups of single rows whose ranges follow from a rule over positions."""
    if not single:
        return []
    rows = np.array(single)
    spans = torch.from_numpy(batch.visible.spans(pattern, window)[rows])
    exact = not _evicted(batch, batch.host.owners[rows].tolist(), spans, pattern)
    return plan_rows(batch, rows, spans[:, None], pattern.rerotated, dtype, exact=exact)


def plan_rows(
    batch: AttentionBatch,
    rows: Array,
    spans: torch.Tensor,
    rerotated: int,
    dtype: torch.dtype,
    *,
    counts: list[int] | None = None,
    exact: bool = True,
    most: int | None = None,
) -> list[Rows]:
    """Groups of single rows.

    Args:
        batch: the step's batch.
        rows: query rows, int64 ``[N]`` on the host.
        spans: each row's ranges, ``[N, heads, K, 2]``; ``heads`` is 1 if all KV heads see the same.
        rerotated: see ``Pattern.rerotated``.
        dtype: of the masks.
        counts: how many tokens each item sees, at most; ``None``: as many as its spans hold, for which the
            host waits if they are on the device.
        exact: an item sees exactly its count, and none on an evicted page.
        most: tokens that a group of more than one item may gather, padding included.
    """
    heads, device = spans.shape[1], batch.device.slots.device
    begins, ends = spans.flatten(0, 1).unbind(-1)
    held = (ends - begins).clamp(min=0).cumsum(dim=1)
    if counts is None:
        counts = held[:, -1].tolist()
    # The column at which each range ends, and the difference between a token's position and its column.
    stops, shifts = to_device(torch.stack([held, ends.maximum(begins) - held]), device)
    planned = []
    for members in groups(counts, most):
        items = np.array(members)
        own = rows[items // heads]
        numbers = np.stack([items, own, items % heads, batch.host.owners[own]])
        group, at, head, owners = to_device(torch.from_numpy(numbers), device)
        width = counts[members[0]]
        columns = torch.arange(width, device=device).expand(len(group), -1).contiguous()
        which = torch.searchsorted(stops[group], columns, right=True)
        real = which < stops.shape[1]
        positions = columns + shifts[group].gather(1, which.clamp(max=stops.shape[1] - 1))
        # Padding and evicted tokens must not read unwritten memory: they read the query's own key instead.
        slots, there = locate(batch.device, owners[:, None], positions.where(real, 0))
        visible = real & there
        slots = slots.where(visible, batch.device.slots[at][:, None]) * heads + head[:, None]
        even = exact and counts[members[-1]] == width
        mask = None if even else additive(visible, dtype)[:, None, None]
        near = (visible & (positions < rerotated))[:, :rerotated] if rerotated else None
        planned.append(Rows(heads, at * heads + head, slots, mask, near))
    return planned


def _evicted(batch: AttentionBatch, sequences: list[int], spans: torch.Tensor, pattern: Pattern) -> bool:
    """Whether a row may see an evicted page; no row can if the pattern's rules agree.

    Args:
        batch: the step's batch.
        sequences: each row's sequence, or one for all rows.
        spans: each row's ranges, ``[N, K, 2]`` on the host.
        pattern: the rule in force.
    """
    host = batch.host
    evicted = [pattern.expired(host.seq_lens[b] - host.query_len(b), host.page_size) for b in sequences]
    first, stop = host.page_size * torch.tensor([(pages.start, pages.stop) for pages in evicted]).T[..., None]
    begins, ends = spans.unbind(-1)
    return bool((begins.maximum(first) < ends.minimum(stop)).any())


def groups(counts: list[int], most: int | None = None) -> list[list[int]]:
    """Groups items by the tokens that each reads, so that padding at most doubles the tokens read.

    Short ones may be padded to ``_SHORT`` tokens. A group's longest member comes first; padded to it, the
    group reads at most ``most`` tokens, unless it has only one member.
    """
    found: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(counts)), key=lambda i: -counts[i]):
        full = most is not None and found and longest * (len(found[-1]) + 1) > most
        if not found or full or longest > max(2 * counts[i], _SHORT):
            found.append([])
            longest = counts[i]
        found[-1].append(i)
    return found


def plan_chunk(
    batch: AttentionBatch,
    b: int,
    start: int,
    stop: int,
    window: int | None,
    pattern: Pattern,
    dtype: torch.dtype,
) -> list[Block]:
    """Query rows ``start`` to ``stop`` of sequence ``b``, in blocks."""
    host, device = batch.host, batch.device
    first = host.seq_lens[b] - host.query_starts[b + 1] + start
    at = torch.from_numpy(host.positions[start:stop])
    spans = torch.from_numpy(batch.visible.spans(pattern, window)[start:stop])
    evicted = _evicted(batch, [b], spans, pattern)
    blocks = []
    for low, high, held in _cut(spans, first):
        positions = torch.cat([torch.arange(*span) for span in held])
        seen = to_device(positions, device.slots.device)
        slots, there = locate(device, b, seen)
        if evicted:
            slots, seen = slots[there], seen[there]
            positions = seen.cpu()
        near = int((positions < pattern.rerotated).sum()) if pattern.rerotated else 0
        mask = None
        if near or len(positions) != high - low or not _causal(spans[low:high], at[low:high]):
            queries = device.positions[start + low : start + high, None]
            mask = additive(visibility(queries, seen, window, pattern), dtype)
        blocks.append(Block(start + low, start + high, slots, mask, near))
    return blocks


def _causal(spans: torch.Tensor, at: torch.Tensor) -> bool:
    """Whether the queries at positions ``at`` see exactly one another, except for later ones."""
    begins, ends = spans.unbind(-1)
    widths = (ends - begins).clamp(min=0)
    return bool(((begins >= at[0]) | (widths == 0)).all() and (widths.sum(dim=1) == at - at[0] + 1).all())


def _cut(spans: torch.Tensor, first: int) -> list[tuple[int, int, list[Span]]]:
    """Cuts the rows of ``spans`` ``[R, K, 2]`` into blocks: first row, row after the last, their ranges.

    Neighbors are joined if gathering their common keys once saves more than computing the masked pairs costs.
    ``first`` is the position of the first row.
    """
    rows = len(spans)
    if _causal(spans, torch.arange(first, first + rows, device=spans.device)):
        return [(0, rows, [(first, first + rows)])]
    cut: list[tuple[int, int, list[Span]]] = []
    for low, high in pairwise([0, *range(_BLOCK_ROWS - first % _BLOCK_ROWS, rows, _BLOCK_ROWS), rows]):
        block = low, high, union(spans[low:high].flatten(0, 1).tolist())
        if cut:
            joined = cut[-1][0], high, union([*cut[-1][2], *block[2]])
            if _cost(joined) <= _cost(cut[-1]) + _cost(block):
                block = joined
                cut.pop()
        cut.append(block)
    return cut


def _cost(block: tuple[int, int, list[Span]]) -> int:
    """The cost of gathering and attending, in pairs of a row and a key."""
    low, high, held = block
    return (high - low + _KEY_COST) * sum(end - begin for begin, end in held)


def union(spans: list[Span]) -> list[Span]:
    """The same positions as disjoint ranges in ascending order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, minus infinity elsewhere: the form that torch's kernels use inside."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )
