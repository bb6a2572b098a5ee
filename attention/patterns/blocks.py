"""Query rows and the pages of their sequences, in blocks that a pattern can look at together."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attention.transfer import to_device
from attention.types import AttentionBatch

# Memory that looking at one block may take: enough to keep a device busy, little beside a cache.
_BYTES = 64 << 20

# Up to this many pages, a block of its own costs more than the padding it saves.
_SHORT = 32


class Block(NamedTuple):
    """``R`` query rows of each of ``S`` sequences.

    Attributes:
        rows: int64 ``[S, R]``, indices into the rows that were asked for.
        positions: int64 ``[S, R]``.
        pages: int64 ``[S, P]``, the sequences' pages, 0 where there is none.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor


def blocks(rows: torch.Tensor, batch: AttentionBatch, page_bytes: int, row_bytes: int) -> list[Block]:
    """All of ``rows``, each in one block.

    Sequences with one row each come together, of similar length, so that padding never doubles the work.

    Args:
        rows: int64 ``[N]`` on the host, query rows of the batch, ascending. Of a batch that is ``fixed`` all
            of them, on the device; then blocks depend on shapes alone, and are as wide as the page table.
        batch: the step's work.
        page_bytes: memory that one page of one sequence takes in a block.
        row_bytes: memory that one row and one page take in a block.
    """
    if batch.device_only:
        return _fixed(batch, page_bytes + row_bytes)
    # The plan holds the rows, so nothing else can get their id while the batch lives.
    key = ("blocks", id(rows), page_bytes, row_bytes)
    return batch.plan(key, lambda: (rows, _build(rows, batch, page_bytes, row_bytes)))[1]


def _fixed(batch: AttentionBatch, bytes_each: int) -> list[Block]:
    table, width = batch.page_table, batch.page_table.shape[1]
    starts = torch.arange(width, device=table.device) * batch.page_size
    step = max(1, _BYTES // (width * bytes_each))
    every = torch.arange(len(batch.positions), device=table.device)[:, None]
    parts = (numbers.split(step) for numbers in (every, batch.positions[:, None], batch.owners))
    # Behind a sequence's end the table holds anything.
    return [
        Block(rows, positions, table[owners].long().where(starts <= positions, 0))
        for rows, positions, owners in zip(*parts, strict=True)
    ]


def _build(rows: torch.Tensor, batch: AttentionBatch, page_bytes: int, row_bytes: int) -> list[Block]:
    asked: dict[int, list[int]] = {}
    for index, owner in enumerate(batch.host_owners[rows].tolist()):
        asked.setdefault(owner, []).append(index)

    def block(sequences: list[int], indices: list[list[int]]) -> Block:
        at = torch.tensor(indices)
        which, at, positions = (
            to_device(numbers, batch.page_table.device)
            for numbers in (torch.tensor(sequences), at, batch.host_positions[rows[at]])
        )
        return Block(at, positions, batch.page_table[which, : max(lengths[b] for b in sequences)].long())

    lengths = {b: -(-batch.seq_lens[b] // batch.page_size) for b in asked}
    result = []
    group: list[int] = []
    for b in sorted(asked, key=lambda b: -lengths[b]):
        indices = asked[b]
        if len(indices) > 1:
            step = max(1, _BYTES // (lengths[b] * row_bytes))
            result += [block([b], [indices[i : i + step]]) for i in range(0, len(indices), step)]
            continue
        if group:
            longest = lengths[group[0]]
            full = (len(group) + 1) * longest * (page_bytes + row_bytes) > _BYTES
            if full or longest > max(2 * lengths[b], _SHORT):
                result.append(block(group, [asked[other] for other in group]))
                group = []
        group.append(b)
    if group:
        result.append(block(group, [asked[other] for other in group]))
    return result
