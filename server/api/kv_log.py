"""What has become of the prefix cache's pages, kept for those who follow it."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import NamedTuple

import msgspec

from server.kv_messages import AllBlocksCleared, BlockRemoved, BlockStored, Event

# Kept for followers that come again, or are slow. A batch of a step of 2048 tokens takes some 8 KB.
_KEPT_BATCHES = 4096
# Of one message, far below the 4 MiB that gRPC's clients take.
_SNAPSHOT_TOKENS = 1 << 16


class NotKeptError(Exception):
    """The batch of a number can't be had: it is not kept any more, or of a server before this one."""


class Batch(NamedTuple):
    """Events that came at a time, or a part of the state at a time.

    Attributes:
        number: one more than that of the batch before.
        time: seconds since 1970.
        first_event: how many events came before them.
        events: in order.
        part: of a state which of its parts this is, from 0; ``None`` for events.
        parts: of a state how many it has.
        pages: of a state how many it has.
    """

    number: int
    time: float
    first_event: int
    events: list[Event]
    part: int | None = None
    parts: int = 0
    pages: int = 0


class _Kept(NamedTuple):
    time: float
    first_event: int
    events: bytes


class _Page(NamedTuple):
    before: int | None
    tokens: array[int]


class KVLog:
    """The events of all engines of a server, one after another, and the state that they lead to.

    The first number is the time in microseconds, so that a number of a server before this one is below all
    that are kept, and is not taken for one of these.

    Args:
        clock: seconds since 1970; of tests.
        kept: batches that are kept.
    """

    def __init__(self, clock: Callable[[], float] = time.time, kept: int = _KEPT_BATCHES) -> None:
        self._clock = clock
        self._next = round(clock() * 1e6)
        self._count = 0
        self._kept: deque[_Kept] = deque(maxlen=kept)
        self._pages: dict[int, _Page] = {}
        self._more = asyncio.Event()
        self.clear()

    def clear(self) -> None:
        """No page can be found: there is no engine, or another one will come."""
        self.add([AllBlocksCleared()])

    def add(self, events: list[Event]) -> None:
        """An engine's next events, in one batch."""
        for event in events:
            match event:
                case BlockStored(names, before, tokens, size):
                    for index, name in enumerate(names):
                        page = _Page(before, array("I", tokens[index * size : (index + 1) * size]))
                        self._pages[name] = page
                        before = name
                case BlockRemoved(names):
                    for name in names:
                        self._pages.pop(name, None)
                case AllBlocksCleared():
                    self._pages.clear()
        self._kept.append(_Kept(self._clock(), self._count, msgspec.msgpack.encode(events)))
        self._next += 1
        self._count += len(events)
        self._more.set()
        self._more = asyncio.Event()

    async def follow(self, start: int) -> AsyncGenerator[Batch, None]:
        """Batches from a number on, without end.

        A follower that is slow costs no memory once it has the state: it reads what is kept for all.

        Args:
            start: the first number; 0 for the state now, and then what follows.

        Raises:
            NotKeptError: the next one is not kept, or ``start`` is above the next one to come.
        """
        if start == 0:
            start = self._next
            for batch in self._state():
                yield batch
        while True:
            oldest = self._next - len(self._kept)
            if not oldest <= start <= self._next:
                raise NotKeptError
            if start == self._next:
                await self._more.wait()
                continue
            kept = self._kept[start - oldest]
            events = msgspec.msgpack.decode(kept.events, type=list[Event])
            yield Batch(start, kept.time, kept.first_event, events)
            start += 1

    def _state(self) -> Iterator[Batch]:
        """All pages as they are now, each after the one before it; the last part has the last number."""
        pages, now, last = dict(self._pages), self._clock(), self._next - 1
        size = len(next(iter(pages.values())).tokens) if pages else 1
        of_part = max(1, _SNAPSHOT_TOKENS // size)
        parts = max(1, math.ceil(len(pages) / of_part))
        ordered = _ordered(pages)
        for part in range(parts):
            events: list[Event] = [] if part else [AllBlocksCleared()]
            for name, page in itertools.islice(ordered, of_part):
                events.append(BlockStored([name], page.before, page.tokens.tolist(), size))
            yield Batch(last - parts + 1 + part, now, 0, events, part, parts, len(pages))


def _ordered(pages: dict[int, _Page]) -> Iterator[tuple[int, _Page]]:
    """Pages, each after the one before it if that is among them. Mostly they have come in this order."""
    told: set[int] = set()
    for name in pages:
        chain = []
        found: int | None = name
        while found is not None and found in pages and found not in told:
            told.add(found)
            chain.append(found)
            found = pages[found].before
        for each in reversed(chain):
            yield each, pages[each]
