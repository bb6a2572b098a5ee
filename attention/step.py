"""One step's sequences and tokens: the host's part, and the device's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attention.transfer import to_device

Array = np.ndarray[Any, Any]

# Columns that a page table gets at once where decodes outgrow it.
_SPARE_PAGES = 8


@dataclass(frozen=True, slots=True, init=False, eq=False)
class StepBatch:
    """The host's part of a step: ``T`` query tokens of ``B`` sequences, one after the other.

    Sequence ``b`` owns the query rows ``query_starts[b]:query_starts[b + 1]``; they are its *last* tokens.

    Args:
        computed: for each sequence, its tokens whose keys are already in the cache.
        counts: for each sequence, the tokens to compute now.
        page_size: tokens per page.
        prompt_lens: for each sequence, the tokens that were given to it; ``None`` for all so far.

    Attributes:
        query_starts: ``B + 1``: each sequence's first query row, and ``T``.
        seq_lens: ``B``: tokens of each sequence with keys in the cache once this step's keys are written, the
            queries' own included.
        prompt_lens: ``B``: tokens of each sequence that were given to it; later ones are
            its output. May be more than ``seq_lens``.
        page_size: tokens per page.
        decode_only: every sequence has a single query token.
        owners: each query row's sequence, int64 ``[T]``.
        positions: each query row's position in its sequence, int64 ``[T]``.
        row_prompt_lens: the prompt length of each query row's sequence, int64 ``[T]``.

    Raises:
        ValueError: there is no sequence, the lists differ in length, or a number is too small.
    """

    query_starts: tuple[int, ...]
    seq_lens: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    page_size: int
    decode_only: bool
    owners: Array
    positions: Array
    row_prompt_lens: Array

    def __init__(
        self,
        computed: Sequence[int],
        counts: Sequence[int],
        page_size: int,
        prompt_lens: Sequence[int] | None = None,
    ) -> None:
        size = len(computed)
        if not size or len(counts) != size or (prompt_lens is not None and len(prompt_lens) != size):
            raise ValueError("a step needs the numbers of each of its sequences, at least one")
        if page_size < 1 or min(counts) < 1 or min(computed) < 0:
            raise ValueError("a step computes at least one token of each sequence, after none or more")
        seq_lens = tuple(have + add for have, add in zip(computed, counts, strict=True))
        lens = seq_lens if prompt_lens is None else tuple(prompt_lens)
        decode_only = max(counts) == 1
        starts: tuple[int, ...]
        if decode_only:
            # Runs for every token. After a step has read all weights, the code of each numpy or torch
            # function is in none of the processor's caches, so plain Python numbers are faster.
            starts, owners = tuple(range(size + 1)), np.arange(size, dtype=np.int64)
            positions, row_prompt_lens = np.array(computed, dtype=np.int64), np.array(lens, dtype=np.int64)
        else:
            have, add = np.array(computed, dtype=np.int64), np.array(counts, dtype=np.int64)
            edges = np.concatenate([[0], np.cumsum(add)])
            owners = np.repeat(np.arange(size), add)
            positions = np.arange(edges[-1]) - edges[owners] + have[owners]
            starts, row_prompt_lens = tuple(edges.tolist()), np.array(lens, dtype=np.int64)[owners]
        known = (starts, seq_lens, lens, page_size, decode_only, owners, positions, row_prompt_lens)
        for name, value in zip(self.__slots__, known, strict=True):
            object.__setattr__(self, name, value)

    def advance(self) -> None:
        """Makes a decode step, built with its prompt lengths, the same sequences' next one, in place."""
        assert self.decode_only
        object.__setattr__(self, "seq_lens", tuple([length + 1 for length in self.seq_lens]))
        np.add(self.positions, 1, out=self.positions)

    @property
    def size(self) -> int:
        """Number of sequences."""
        return len(self.seq_lens)

    def query_len(self, b: int) -> int:
        """Number of query tokens of sequence ``b``."""
        return self.query_starts[b + 1] - self.query_starts[b]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """The device's part of a step, all of it on the device.

    Attributes:
        owners: int64 ``[T]``: each query token's row of the page table.
        positions: int64 ``[T]``: each query token's position in its sequence.
        slots: int64 ``[T]``: where each query token's own key and value are written:
            ``page * page_size + offset``.
        page_table: int32 ``[R, P]``: page ``page_table[r, t // page_size]`` holds token ``t`` at offset
            ``t % page_size``. Entries of evicted pages hold 0, the page that is never written; in a batch
            that was advanced they can still name a page that another sequence has got since. No query sees
            tokens there.
        page_size: tokens per page.

    Raises:
        ValueError: shapes disagree.
    """

    owners: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    page_table: torch.Tensor
    page_size: int

    def __post_init__(self) -> None:
        rows = self.positions.shape
        if len(rows) != 1 or self.owners.shape != rows or self.slots.shape != rows:
            raise ValueError("owners, positions and slots are one number for each query token")
        if self.page_table.ndim != 2 or self.page_size < 1:
            raise ValueError("a page table has rows of pages, and a page at least one token")

    @classmethod
    def of(cls, host: StepBatch, pages: Sequence[Sequence[int]], device: torch.device) -> DeviceBatch:
        """The device's part of a step that the host knows.

        Entries of the page table past a sequence's end hold 0.

        Args:
            host: the step.
            pages: for each sequence, its pages in order, enough for all of its tokens.
            device: where the tensors go.

        Raises:
            ValueError: the pages are not those of as many sequences, or too few for a sequence's tokens.
        """
        if len(pages) != host.size:
            raise ValueError(f"pages of {len(pages)} sequences for {host.size}")
        page_size = host.page_size
        if any(len(owned) * page_size < n for owned, n in zip(pages, host.seq_lens, strict=True)):
            raise ValueError("a sequence has fewer pages than its tokens need")
        table = np.zeros((len(pages), max(map(len, pages))), dtype=np.int32)
        for row, owned in zip(table, pages, strict=True):
            row[: len(owned)] = owned
        rows = np.empty((3, len(host.positions)), dtype=np.int64)
        rows[0], rows[1] = host.owners, host.positions
        if host.decode_only:
            rows[2] = [
                owned[(length - 1) // page_size] * page_size + (length - 1) % page_size
                for length, owned in zip(host.seq_lens, pages, strict=True)
            ]
        else:
            own = table[host.owners, host.positions // page_size]
            rows[2] = own * np.int64(page_size) + host.positions % page_size
        owners, positions, slots = to_device(torch.from_numpy(rows), device).unbind()
        return cls(owners, positions, slots, to_device(torch.from_numpy(table), device), page_size)

    def advance(self, host: StepBatch, pages: Sequence[Sequence[int]]) -> None:
        """The same for the device's part, where that is the host's own memory.

        An evicted page stays in the table until its sequence gets another page; no query sees it.

        Args:
            host: the step, advanced already.
            pages: as of ``of``, the same lists or longer ones.
        """
        positions, slots, table = self.positions.numpy(), self.slots.numpy(), self.page_table.numpy()
        np.copyto(positions, host.positions)
        np.add(slots, 1, out=slots)
        page_size = self.page_size
        for row, length in enumerate(host.seq_lens):
            if length % page_size == 1 or page_size == 1:  # the first token of a page
                owned = pages[row]
                if len(owned) > table.shape[1]:
                    table = np.pad(table, ((0, 0), (0, _SPARE_PAGES)))
                    object.__setattr__(self, "page_table", torch.from_numpy(table))
                table[row, : len(owned)] = owned
                slots[row] = owned[(length - 1) // page_size] * page_size

    @classmethod
    def captured(
        cls, owners: torch.Tensor, positions: torch.Tensor, page_table: torch.Tensor, page_size: int
    ) -> DeviceBatch:
        """Decode rows, of which the host knows only their number.

        Computing from it calls the same operators on the same memory for any numbers, so that it can be
        captured once and replayed with others.

        Args:
            owners: int64 ``[T]``. May be longer than the table is; tokens of the same row at the same
                position must be the same.
            positions: int64 ``[T]``.
            page_table: int32 ``[R, P]``.
            page_size: tokens per page.
        """
        pages = page_table[owners, positions // page_size].long()
        return cls(owners, positions, pages * page_size + positions % page_size, page_table, page_size)
