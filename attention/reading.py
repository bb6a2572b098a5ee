"""What a step's attention reads of the cache, and what it need not: what a pattern saves."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from attention.backends import Attention
from attention.kernels.base import choosing_rows, spans_of
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.table import pages_chosen_at
from attention.types import AttentionBatch


class LayerReads(NamedTuple):
    """What *each* of some layers, whose queries see the same keys, reads in one step.

    Attributes:
        layers: their indices.
        pages: that hold a key which some query of the step may see, summed over sequences.
        pairs: of a query and a key that it sees; a choice by pages counts with all their tokens.
        summaries: pages whose summaries are looked at to choose among them.
    """

    layers: tuple[int, ...]
    pages: int
    pairs: int
    summaries: int = 0


class Pages(NamedTuple):
    """Pages of one step, summed over layers and sequences.

    Attributes:
        read: those that hold a key which some query of the step may see.
        skipped: the other pages of the sequences' tokens, which full attention would read.
        by_layer: the same as ``read``, and more, by kind of layer.
    """

    read: int
    skipped: int
    by_layer: tuple[LayerReads, ...]


def pages_of(attention: Attention, batch: AttentionBatch) -> Pages:
    """Counts on the host, from what the batch knows there.

    Rows that choose by content count with the pages that they choose (``ContentPattern.pages_chosen``); the
    summaries that they look at for it count apart.
    """
    pages = [-(-length // batch.page_size) for length in batch.seq_lens]
    total = sum(pages)
    found = []
    for pattern, window, layers in attention.kinds:
        if pattern.dense and window is None:
            found.append(LayerReads(layers, total, _pairs(batch)))
        else:
            found.append(LayerReads(layers, *_seen(pattern, window, batch, pages)))
    read = sum(len(reads.layers) * reads.pages for reads in found)
    return Pages(read, len(attention.layers) * total - read, tuple(found))


def _pairs(batch: AttentionBatch) -> int:
    """Of a query and a key before it or its own."""
    queries = [stop - start for start, stop in itertools.pairwise(batch.query_starts)]
    # A sequence's last q tokens of n: the first of them sees n - q + 1 keys, the last one n.
    return sum(q * (2 * n - q + 1) for q, n in zip(queries, batch.seq_lens, strict=True)) // 2


def _seen(
    pattern: Pattern, window: int | None, batch: AttentionBatch, pages: list[int]
) -> tuple[int, int, int]:
    """Pages, pairs and summaries, see ``LayerReads``."""
    owners = batch.host_owners.numpy()
    if isinstance(pattern, ContentPattern):
        positions, prompt_lens = batch.host_positions.numpy(), batch.host_prompt_lens.numpy()
        chosen = pages_chosen_at(pattern, positions, prompt_lens, batch.page_size)
        choosing = choosing_rows(batch, pattern).numpy()
        if batch.decode_only:
            read = chosen.tolist()
            pairs = (min(n * batch.page_size, at + 1) for n, at in zip(read, positions.tolist(), strict=True))
            return sum(read), sum(pairs), sum(pages[b] for b in owners[choosing].tolist())
        # A chunk's rows choose by themselves; the one that reads most stands for what they read together.
        most = np.maximum.reduceat(chosen, batch.query_starts[:-1])
        seen = np.minimum(chosen * batch.page_size, positions + 1)
        return int(most.sum()), int(seen.sum()), sum(pages[b] for b in set(owners[choosing].tolist()))
    spans = spans_of(batch, pattern, window)
    if batch.decode_only:
        return *_seen_alone(spans.tolist(), batch.page_size), 0
    begin, end = np.moveaxis(spans.numpy(), -1, 0)
    rows, some = np.broadcast_to(owners[:, None], begin.shape), begin < end
    # Where the number of open ranges is not 0, a page is read.
    width = max(pages) + 1
    opened = (rows * width + begin // batch.page_size)[some]
    closed = (rows * width - -end // batch.page_size)[some]
    edges = np.bincount(opened, minlength=batch.size * width) - np.bincount(
        closed, minlength=batch.size * width
    )
    read = np.count_nonzero(edges.reshape(batch.size, width).cumsum(axis=1))
    return int(read), int((end - begin)[some].sum()), 0


def _seen_alone(spans: list[list[tuple[int, int]]], page_size: int) -> tuple[int, int]:
    """Pages and pairs where every sequence has one query; arrays cost more than so few numbers."""
    pages = pairs = 0
    for ranges in spans:
        after = 0  # the last page that was counted
        for begin, end in ranges:
            if begin < end:
                pairs += end - begin
                first, after = max(after, begin // page_size), -(-end // page_size)
                pages += after - first
    return pages, pairs
