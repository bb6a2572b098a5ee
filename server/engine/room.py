"""The room that running sequences leave for others: places and pages."""

from __future__ import annotations

import bisect
from collections.abc import Collection
from collections.abc import Sequence as Listed
from typing import NamedTuple

from server.engine.kv_manager import KVManager
from server.engine.sequence import Sequence


class Need(NamedTuple):
    """What a sequence takes.

    Attributes:
        places: of the sequences that run at once.
        pages: that no sequence holds yet.
    """

    places: int
    pages: int

    def plus(self, other: Need) -> Need:
        """What both take."""
        return Need(self.places + other.places, self.pages + other.pages)


NOTHING = Need(0, 0)


class Room:
    """Tells whether a sequence may run beside those that do.

    Pages that admitted prompts still lack are theirs, and a page for each running sequence stays in reserve,
    else the next step would preempt at once.

    Args:
        kv: the pages.
        running: the sequences that run, as they come and go.
        most: places in all.
        step: tokens of a step, at most.
    """

    def __init__(self, kv: KVManager, running: Listed[Sequence], most: int, step: int) -> None:
        self._kv, self._running, self._most, self._step = kv, running, most, step

    @property
    def full(self) -> bool:
        """Whether no place is left."""
        return self._places(self._running) >= self._most

    def need(self, sequence: Sequence) -> Need:
        """What a sequence that waits takes beyond the pages that it holds."""
        return Need(sequence.width, self._missing(sequence) + self._kv.copied(sequence))

    def kept_for(self, first: Sequence) -> Need:
        """What others that enter before the first in the queue have to leave to it.

        A single place is soon free again, and by then it is the first's turn. Several are never free at once
        where others take them one by one.
        """
        places = first.width if first.width > 1 else 0
        return Need(places, self._kv.demand_of(first, self._step))

    def fits(self, need: Need, without: Collection[Sequence] = ()) -> bool:
        """Whether there is room, at best, once others have given way.

        Pages that several of them hold are counted for each; ``to_give_way`` counts what becomes free.
        """
        return self._fits(need, without, sum(map(_held, without)))

    def to_give_way(self, need: Need, kept: Need, outranked: Listed[Sequence]) -> Listed[Sequence] | None:
        """The running sequences to preempt, as few as make room for another one; ``None`` if none would.

        None gives way for what is kept for those that wait longer: where there is room for ``need`` without
        it, the others must leave it too.

        Args:
            need: of the sequence that is to run, with the pages that it has found.
            kept: what must stay free then.
            outranked: those that may be preempted, the least urgent last.
        """

        def fits(count: int, all_of_it: Need = need) -> bool:
            without = outranked[len(outranked) - count :]
            freed = self._kv.pool.freed(page for s in without for part in s.parts for page in part.pages)
            return self._fits(all_of_it, without, freed)

        # The more give way, the more room there is.
        count = bisect.bisect_left(range(len(outranked) + 1), True, key=fits)
        if count > len(outranked) or not fits(count, need.plus(kept)):
            return None
        return outranked[len(outranked) - count :]

    def _fits(self, need: Need, without: Collection[Sequence], freed: int) -> bool:
        gone = set(without)
        running = [s for s in self._running if s not in gone]
        places = self._places(running)
        behind = (s for s in running if any(part.remaining > 1 for part in s.parts))
        reserve = places + sum(map(self._missing, behind))
        available = self._kv.pool.available + freed
        return places + need.places <= self._most and need.pages + reserve <= available

    def _missing(self, sequence: Sequence) -> int:
        """Pages that a sequence will hold once its tokens are computed, beyond those that it has."""
        return max(0, self._kv.demand_of(sequence, self._step) - _held(sequence))

    @staticmethod
    def _places(running: Listed[Sequence]) -> int:
        """Of sequences that run, and that these can become."""
        return sum(sequence.width for sequence in running)


def _held(sequence: Sequence) -> int:
    if sequence.group is not None:
        return len({page for part in sequence.parts for page in part.pages if page})
    return len(sequence.pages) - sequence.pages.count(0)
