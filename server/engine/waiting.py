"""The sequences that wait, so ordered that a step looks only at the first ones."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from server.engine.sequence import Sequence


class Waiting:
    """Sequences that wait, by urgency, and by priority and length.

    Neither order changes while they wait: all grow more urgent at the same rate, and what the prefix cache
    has of them is looked up once. Followers, whose leader computes pages for them, stand apart, in no order.
    """

    def __init__(self) -> None:
        self._by_urgency: list[tuple[tuple[float, int], Sequence]] = []
        self._by_length: list[tuple[tuple[int, int, int], Sequence]] = []
        self._keys: dict[Sequence, tuple[tuple[float, int], tuple[int, int, int]]] = {}
        self._followers: dict[int, list[Sequence]] = {}
        self._leader_of: dict[Sequence, int] = {}
        self.sequences = 0
        """How many these can become: of a beam search all of its beams."""

    def __len__(self) -> int:
        return len(self._keys) + len(self._leader_of)

    def __iter__(self) -> Iterator[Sequence]:
        """All, the most urgent first, but followers last."""
        yield from (sequence for _, sequence in self._by_urgency)
        yield from self._leader_of

    @property
    def first(self) -> Sequence | None:
        """The most urgent one that follows no other."""
        return self._by_urgency[0][1] if self._by_urgency else None

    def shortest(self, count: int, above: float) -> list[Sequence]:
        """The first ``count`` by priority and then length, of those with a priority above ``above``."""
        return [sequence for key, sequence in self._by_length[:count] if -key[0] > above]

    def add(self, sequence: Sequence) -> None:
        """Adds a sequence that follows no other; ``found`` is set."""
        self.sequences += sequence.width
        urgency = sequence.urgency
        length = (-sequence.request.priority, sequence.to_compute, sequence.arrival)
        self._keys[sequence] = urgency, length
        bisect.insort(self._by_urgency, (urgency, sequence))
        bisect.insort(self._by_length, (length, sequence))

    def add_follower(self, sequence: Sequence, leader: int) -> None:
        """Adds a sequence that waits for the one with the id ``leader``."""
        self.sequences += sequence.width
        self._followers.setdefault(leader, []).append(sequence)
        self._leader_of[sequence] = leader

    def take_followers(self, leader: int) -> list[Sequence]:
        """Removes all followers of a sequence, and returns them."""
        followers = self._followers.pop(leader, [])
        for sequence in followers:
            self.sequences -= sequence.width
            del self._leader_of[sequence]
        return followers

    def remove(self, sequence: Sequence) -> None:
        """Removes one that waits."""
        self.sequences -= sequence.width
        leader = self._leader_of.pop(sequence, None)
        if leader is not None:
            self._followers[leader].remove(sequence)
            return
        urgency, length = self._keys.pop(sequence)
        # Keys end in the order of arrival, so that no two are equal.
        del self._by_urgency[bisect.bisect_left(self._by_urgency, (urgency,))]
        del self._by_length[bisect.bisect_left(self._by_length, (length,))]
