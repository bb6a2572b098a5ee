"""Bounds on answers with a vector for each token, held before anything is computed."""

from __future__ import annotations

import asyncio
from collections import Counter

from server.api import errors
from server.api.errors import Violation

# While an answer is written, other calls wait.
_OF_ONE = 16 << 20
# Each is there several times until it is sent, which takes as long as its client reads.
_OF_ALL = 256 << 20
# Of one connection, so that a client that reads nothing leaves room for three others.
_SHARE = 4
_RETRY_SECONDS = 1.0


class VectorBytes:
    """Counts the vectors that requests in flight wait for.

    Args:
        most: bytes of all of them, at most.
    """

    def __init__(self, most: int = _OF_ALL) -> None:
        self._most, self._most_of_one = most, most // _SHARE
        self._held = 0
        self._held_by: Counter[str] = Counter()

    def hold(self, size: int, holder: str) -> None:
        """Counts a request's vectors until this task, which serves it, ends: once its answer has been sent.

        Args:
            size: their bytes.
            holder: who holds them: an identity, or a connection where all are one.

        Raises:
            ServiceError: they are more than a request may have, or than there is room for now.
        """
        if size > _OF_ONE:
            sentence = (
                f"asks for {size} bytes of vectors; at most {_OF_ONE} are sent, so send fewer or shorter "
                "texts, or ask for one vector of each"
            )
            raise errors.invalid([Violation("pooling", sentence)])
        if not size:
            return
        if self._held_by[holder] + size > self._most_of_one:
            sentence = (
                f"requests in flight of this caller wait for {self._held_by[holder]} bytes of vectors of "
                f"tokens, this one asks for {size}, and {self._most_of_one} are the most of one; read their "
                "answers first, or ask for one vector of each text"
            )
            raise errors.limit_reached(sentence, "VECTOR_BYTES", self._most_of_one, _RETRY_SECONDS)
        if self._held + size > self._most:
            sentence = (
                f"requests in flight wait for {self._held} bytes of vectors of tokens, this one asks for "
                f"{size}, and {self._most} are the most; try again soon, or ask for one vector of each text"
            )
            raise errors.limit_reached(sentence, "VECTOR_BYTES", self._most, _RETRY_SECONDS)
        task = asyncio.current_task()
        assert task is not None
        self._held += size
        self._held_by[holder] += size
        task.add_done_callback(lambda _: self._release(size, holder))

    def _release(self, size: int, holder: str) -> None:
        self._held -= size
        self._held_by[holder] -= size
        if not self._held_by[holder]:
            del self._held_by[holder]
