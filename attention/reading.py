"""How many pages of the cache a step's attention reads, and how many it need not: what a pattern saves."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from attention.backends import Attention
from attention.kernels.base import spans_within
from attention.patterns.base import ContentPattern, Pattern
from attention.types import AttentionBatch


class Pages(NamedTuple):
    """Pages of one step, summed over layers and sequences.

    Attributes:
        read: those that hold a key which some query of the step may see.
        skipped: the other pages of the sequences' tokens, which full attention would read.
    """

    read: int
    skipped: int


def pages_of(attention: Attention, batch: AttentionBatch) -> Pages:
    """Counts on the host, from what the batch knows there.

    Rows that choose by content count with the pages that they choose (``ContentPattern.pages_chosen``); the
    digests that they look at for it do not count.
    """
    page_size = batch.page_size
    pages = torch.tensor(batch.seq_lens).add(page_size - 1) // page_size
    total = int(pages.sum())
    kinds = Counter((attention.pattern_of(layer), layer.window) for layer in attention.layers)
    read = 0
    for (pattern, window), layers in kinds.items():
        seen = total if pattern.dense and window is None else _seen(pattern, window, batch, int(pages.max()))
        read += layers * seen
    return Pages(read, len(attention.layers) * total - read)


def _seen(pattern: Pattern, window: int | None, batch: AttentionBatch, most: int) -> int:
    lengths = torch.tensor(batch.query_starts).diff()
    owners = torch.repeat_interleave(lengths)
    offsets = torch.tensor(batch.seq_lens) - torch.tensor(batch.query_starts[1:])
    positions = torch.arange(len(owners)) + offsets[owners]
    if isinstance(pattern, ContentPattern):
        chosen = pattern.pages_chosen(positions, torch.tensor(batch.prompt_lens)[owners], batch.page_size)
        # A chunk's rows choose by themselves; the one that reads most stands for what they read together.
        return int(torch.zeros(batch.size, dtype=torch.long).scatter_reduce(0, owners, chosen, "amax").sum())
    spans = spans_within(pattern.spans(positions), positions, window)
    begin, end = spans[..., 0] // batch.page_size, -(-spans[..., 1] // batch.page_size)
    some = spans[..., 0] < spans[..., 1]
    # Where the number of open ranges is not 0, a page is read.
    edges = torch.zeros(batch.size, most + 1, dtype=torch.long)
    rows = owners[:, None].expand_as(begin)[some]
    edges.index_put_((rows, begin[some]), torch.ones(len(rows), dtype=torch.long), accumulate=True)
    edges.index_put_((rows, end[some]), -torch.ones(len(rows), dtype=torch.long), accumulate=True)
    return int((edges.cumsum(dim=1) > 0).sum())
