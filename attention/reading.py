"""The pages that a step's attention reads, and those that the pattern saves it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from attention.backends import Attention
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.table import pages_selected_at
from attention.step import StepBatch
from attention.visible import Visible


class LayerReads(NamedTuple):
    """The pages that *each* of some layers, whose queries see the same keys, reads in one step.

    Attributes:
        layers: their indices.
        pages: those with a key that some query of the step may see, summed over sequences.
        pairs: of a query and a key that it sees; a selection of pages counts with all their tokens.
        summaries: pages whose summaries are read to select among them.
    """

    layers: tuple[int, ...]
    pages: int
    pairs: int
    summaries: int = 0


class Pages(NamedTuple):
    """Pages of one step, summed over layers and sequences.

    Attributes:
        read: those with a key that some query of the step may see.
        skipped: the other pages of the sequences' tokens, which full attention would read.
        by_layer: ``read`` and further counts by kind of layer.
    """

    read: int
    skipped: int
    by_layer: tuple[LayerReads, ...]


def pages_of(attention: Attention, visible: Visible) -> Pages:
    """Counts the pages of a step on the host.

    Rows that select by content count with the pages that they select (``ContentPattern.pages_selected``); the
    summaries that they read count separately.
    """
    host = visible.host
    pages = [-(-length // host.page_size) for length in host.seq_lens]
    total = sum(pages)
    found = []
    for pattern, window, layers in attention.alike:
        if pattern.dense and window is None:
            found.append(LayerReads(layers, total, _pairs(host)))
        else:
            found.append(LayerReads(layers, *_seen(pattern, window, visible, pages)))
    read = sum(len(reads.layers) * reads.pages for reads in found)
    return Pages(read, len(attention.layers) * total - read, tuple(found))


def _pairs(host: StepBatch) -> int:
    """Pairs of a query and a key before it or its own."""
    queries = [stop - start for start, stop in itertools.pairwise(host.query_starts)]
    # A sequence's last q tokens of n: the first of them sees n - q + 1 keys, the last one n.
    return sum(q * (2 * n - q + 1) for q, n in zip(queries, host.seq_lens, strict=True)) // 2


def _seen(pattern: Pattern, window: int | None, visible: Visible, pages: list[int]) -> tuple[int, int, int]:
    """Pages, pairs and summaries, see ``LayerReads``."""
    host, page_size = visible.host, visible.host.page_size
    if isinstance(pattern, ContentPattern):
        selected = pages_selected_at(pattern, host.positions, host.row_prompt_lens, page_size)
        selecting = host.owners[visible.selecting(pattern)].tolist()
        if host.decode_only:
            read = selected.tolist()
            pairs = (min(n * page_size, length) for n, length in zip(read, host.seq_lens, strict=True))
            return sum(read), sum(pairs), sum(pages[b] for b in selecting)
        # A chunk's rows have separate selections; the largest stands for the pages that the chunk reads.
        most = np.maximum.reduceat(selected, host.query_starts[:-1])
        seen = np.minimum(selected * page_size, host.positions + 1)
        return int(most.sum()), int(seen.sum()), sum(pages[b] for b in set(selecting))
    spans = visible.spans(pattern, window)
    if host.decode_only:
        return *_seen_by_decodes(spans.tolist(), page_size), 0
    begin, end = np.moveaxis(spans, -1, 0)
    rows, some = np.broadcast_to(host.owners[:, None], begin.shape), begin < end
    # A page is read if the number of open ranges is not 0.
    width = max(pages) + 1
    opened = (rows * width + begin // page_size)[some]
    closed = (rows * width - -end // page_size)[some]
    edges = np.bincount(opened, minlength=host.size * width) - np.bincount(
        closed, minlength=host.size * width
    )
    read = np.count_nonzero(edges.reshape(host.size, width).cumsum(axis=1))
    return int(read), int((end - begin)[some].sum()), 0


def _seen_by_decodes(spans: list[list[tuple[int, int]]], page_size: int) -> tuple[int, int]:
    """Pages and pairs of a decode step; no arrays, which cost more for so few numbers."""
    pages = pairs = 0
    for ranges in spans:
        after = 0  # the last page that was counted
        for begin, end in ranges:
            if begin < end:
                pairs += end - begin
                first, after = max(after, begin // page_size), -(-end // page_size)
                pages += after - first
    return pages, pairs
