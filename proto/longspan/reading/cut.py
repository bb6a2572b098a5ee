"""A document cut into passages of so many tokens, which overlap."""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from longspan.reading.document import Document
from longspan.reading.session import Session
from longspan.reading.types import Passage

_BLOCK_BYTES = 4096  # whose tokens are counted at once


class Cutter:
    """Cuts a document by the tokens that the server's tokenizer makes of it.

    Tokens are counted for blocks of it and taken to be spread evenly over the bytes of each; then every
    passage is counted itself, and halved while it has too many.

    Args:
        document: to be cut.
        session: with the server that counts.
        most: tokens of a passage.
        overlap: tokens of a passage's end that the next one begins with, at most; cut at sentences or lines.
    """

    def __init__(self, document: Document, session: Session, most: int, overlap: int) -> None:
        self._document, self._session, self._most, self._overlap = document, session, most, overlap
        self._blocks: Sequence[int] = (0,)
        self._before: Sequence[int] = (0,)

    async def measure(self) -> None:
        """Counts the document's tokens, which is done once, before anything is cut.

        Raises:
            longspan.LongspanError: the server does not count them.
        """
        blocks, bounds = [0], self._document.bounds
        while blocks[-1] < bounds[-1]:
            wanted = bisect_left(bounds, blocks[-1] + _BLOCK_BYTES)
            blocks.append(bounds[min(wanted, len(bounds) - 1)])
        counted = await self._count(list(pairwise(blocks)), "counting tokens")
        self._blocks, self._before = blocks, [0, *accumulate(counted)]

    def packed(self, parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Neighboring parts joined, as many as one passage has room for.

        Args:
            parts: begin and end of each in bytes, in order and without gaps.
        """
        joined: list[tuple[int, int]] = []
        for start, end in parts:
            if joined and self._tokens(joined[-1][0], end) <= self._most:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        return joined

    async def passages(self, parts: Sequence[tuple[int, int]]) -> list[list[Passage]]:
        """The passages of parts of the document, none of which reaches from one into another.

        Args:
            parts: begin and end of each, bytes that are bounds of the document.

        Raises:
            longspan.LongspanError: the server does not count them.
        """
        runs = [(part, run) for part, (start, end) in enumerate(parts) for run in self._runs(start, end)]
        counted: dict[tuple[int, int], int] = {}
        while True:
            new = [run for _, run in runs if run not in counted]
            counted |= zip(new, await self._count(new, "cutting"), strict=True)
            halved = [
                (part, half)
                for part, run in runs
                for half in ([run] if counted[run] <= self._most else self._halves(run))
            ]
            if halved == runs:
                break
            runs = halved
        cut: list[list[Passage]] = [[] for _ in parts]
        for part, run in runs:
            if passage := self._document.passage(*run):
                cut[part].append(passage)
        return cut

    def _runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Begin and end of what is to become passages, as long as can be."""
        bounds = self._document.bounds
        runs = []
        first, last = bisect_left(bounds, start), bisect_left(bounds, end)
        while True:
            after = first + 1
            while after < last and self._tokens(bounds[first], bounds[after + 1]) <= self._most:
                after += 1
            runs.append((bounds[first], bounds[after]))
            if after == last:
                return runs
            following = after
            while (
                following - 1 > first and self._tokens(bounds[following - 1], bounds[after]) <= self._overlap
            ):
                following -= 1
            first = following

    def _halves(self, run: tuple[int, int]) -> list[tuple[int, int]]:
        start, end = run
        middle = self._document.middle(start, end)
        return [(start, middle), (middle, end)] if start < middle < end else [run]

    def _tokens(self, start: int, end: int) -> float:
        """About how many tokens the bytes from ``start`` to ``end`` have."""
        return self._until(end) - self._until(start)

    def _until(self, byte: int) -> float:
        block = min(bisect_right(self._blocks, byte), len(self._blocks) - 1)
        start, end = self._blocks[block - 1], self._blocks[block]
        share = (byte - start) / max(1, end - start)
        return self._before[block - 1] + share * (self._before[block] - self._before[block - 1])

    async def _count(self, runs: Sequence[tuple[int, int]], stage: str) -> list[int]:
        """Tokens of each run, without the white space around it."""

        async def count(run: tuple[int, int]) -> int:
            passage = self._document.passage(*run)
            return await self._session.count(passage.text) if passage else 0

        return await self._session.all(stage, [functools.partial(count, run) for run in runs])
