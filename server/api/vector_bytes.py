"""Bounds on answers with a vector for each token, held before anything is computed."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import NamedTuple

from server.api import errors
from server.api.errors import Violation

# While an answer is written, other calls wait.
_OF_ONE = 16 << 20
# Each is there several times until it is sent, which takes as long as its client reads.
_OF_ALL = 256 << 20
# Each holder has at most this part of what others leave, so that any number of them leaves something.
# Choudhury and Hahne: Dynamic Queue Length Thresholds for Shared-Memory Packet Switches, 1998.
_SHARE = 4
# Of one address, which may be a proxy's, but also that of one client with many connections.
_OF_ADDRESS = 2
_RETRY_SECONDS = 1.0


class Holder(NamedTuple):
    """On whose account vectors are held.

    Attributes:
        name: an identity, or a connection where all are one.
        address: where that connection comes from; empty for an identity, whose connections are one holder.
    """

    name: str
    address: str = ""

    @classmethod
    def of(cls, identity: str, peer: str) -> Holder:
        """That of a call.

        Args:
            identity: its name, empty where all are one.
            peer: gRPC's name of the connection: of TCP an address and a port.
        """
        return cls(identity) if identity else cls(peer, peer.rpartition(":")[0])


class VectorBytes:
    """Counts the vectors that requests in flight wait for.

    Args:
        most: bytes of all of them, at most.
    """

    def __init__(self, most: int = _OF_ALL) -> None:
        self._most = most
        self._held = 0
        self._held_by: Counter[str] = Counter()

    def hold(self, size: int, holder: Holder) -> None:
        """Counts a request's vectors until this task, which serves it, ends: once its answer has been sent.

        Args:
            size: their bytes.
            holder: on whose account.

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
        share = (self._most - self._held + self._held_by[holder.name]) // _SHARE
        self._refuse_beyond(size, self._held_by[holder.name], share, "of this caller")
        if holder.address:
            most = self._most // _OF_ADDRESS
            self._refuse_beyond(size, self._held_by[holder.address], most, "of this caller's address")
        task = asyncio.current_task()
        assert task is not None
        self._held += size
        self._held_by.update(dict.fromkeys(filter(None, holder), size))
        task.add_done_callback(lambda _: self._release(size, holder))

    @staticmethod
    def _refuse_beyond(size: int, held: int, most: int, whose: str) -> None:
        if held + size <= most:
            return
        sentence = (
            f"requests in flight {whose} wait for {held} bytes of vectors of tokens, this one asks for "
            f"{size}, and {most} are the most beside what others wait for; read their answers first, try "
            "again soon, or ask for one vector of each text"
        )
        raise errors.limit_reached(sentence, "VECTOR_BYTES", most, _RETRY_SECONDS)

    def _release(self, size: int, holder: Holder) -> None:
        self._held -= size
        for key in filter(None, holder):
            self._held_by[key] -= size
            if not self._held_by[key]:
                del self._held_by[key]
