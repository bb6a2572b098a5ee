"""Query rows that select by content and the pages of their sequences, in blocks that select at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from attention.step import Array, DeviceBatch, StepBatch
from attention.transfer import to_device

# Memory that one block's selection may take: enough to keep a device busy, little compared with a KV cache.
_BYTES = 64 << 20

# Up to this many pages, a separate block costs more than the padding that it saves.
_SHORT = 32


class Block(NamedTuple):
    """``R`` query rows of each of ``S`` sequences.

    Attributes:
        rows: int64 ``[S, R]``, indices into the rows that select.
        positions: int64 ``[S, R]``.
        pages: int64 ``[S, P]``, the sequences' pages, 0 where there is none.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor


class SelectingRows(ABC):
    """``N`` query rows of one step. Made once per step and kept: layers of a kind share their blocks.

    Attributes:
        batch: the step.
        rows: int64 ``[N]`` on the device, indices of query rows of the batch, ascending.
        positions: int64 ``[N]`` on the device.
    """

    def __init__(self, batch: DeviceBatch, rows: torch.Tensor, positions: torch.Tensor) -> None:
        self.batch, self.rows, self.positions = batch, rows, positions
        self._blocks: dict[tuple[int, int], list[Block]] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def blocks(self, page_bytes: int, row_bytes: int) -> list[Block]:
        """All of the rows, each in one block.

        Sequences with one row each share blocks by similar length, so that padding at most doubles the pages
        read.

        Args:
            page_bytes: memory that one page of one sequence takes in a block.
            row_bytes: memory that one row and one page take in a block.
        """
        key = page_bytes, row_bytes
        if key not in self._blocks:
            self._blocks[key] = self._build(page_bytes, row_bytes)
        return self._blocks[key]

    @abstractmethod
    def _build(self, page_bytes: int, row_bytes: int) -> list[Block]:
        """See ``blocks``."""


class KnownRows(SelectingRows):
    """Some rows of a step that the host knows.

    Args:
        host: the step on the host.
        batch: the step on the device.
        rows: int64 ``[N]`` on the host, ascending.

    Attributes:
        known: the same rows on the host.
    """

    def __init__(self, host: StepBatch, batch: DeviceBatch, rows: Array) -> None:
        at = to_device(torch.from_numpy(rows), batch.positions.device)
        super().__init__(batch, at, batch.positions[at])
        self.known, self._host = rows, host

    def _build(self, page_bytes: int, row_bytes: int) -> list[Block]:
        host, device = self._host, self.batch.page_table.device
        asked: dict[int, list[int]] = {}
        for index, owner in enumerate(host.owners[self.known].tolist()):
            asked.setdefault(owner, []).append(index)

        def block(sequences: list[int], indices: list[list[int]]) -> Block:
            own = torch.tensor(indices)
            which, at, positions = (
                to_device(numbers, device)
                for numbers in (
                    torch.tensor(sequences),
                    own,
                    torch.from_numpy(host.positions[self.known[own.numpy()]]),
                )
            )
            width = max(lengths[b] for b in sequences)
            return Block(at, positions, self.batch.page_table[which, :width].long())

        lengths = {b: -(-host.seq_lens[b] // host.page_size) for b in asked}
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


class CapturedRows(SelectingRows):
    """All rows of a step that only the device knows.

    Blocks depend only on shapes, and are as wide as the page table.

    Args:
        batch: the step.
    """

    def __init__(self, batch: DeviceBatch) -> None:
        every = torch.arange(len(batch.positions), device=batch.positions.device)
        super().__init__(batch, every, batch.positions)

    def _build(self, page_bytes: int, row_bytes: int) -> list[Block]:
        table, width = self.batch.page_table, self.batch.page_table.shape[1]
        starts = torch.arange(width, device=table.device) * self.batch.page_size
        step = max(1, _BYTES // (width * (page_bytes + row_bytes)))
        columns = self.rows[:, None], self.positions[:, None], self.batch.owners
        parts = (numbers.split(step) for numbers in columns)
        # After a sequence's end the table may hold any pages.
        return [
            Block(rows, positions, table[owners].long().where(starts <= positions, 0))
            for rows, positions, owners in zip(*parts, strict=True)
        ]
