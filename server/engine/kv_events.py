"""Tells which prompts' pages can be found in the prefix cache, for routers to know."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from server.engine.kv_publisher import Publisher
from server.kv_messages import BlockRemoved, BlockStored, Event, name_of
from server.settings import Settings


class KVEvents:
    """What becomes of pages, as events, from what the KV manager tells.

    Args:
        page_size: tokens of a page.
        publisher: gets each event at once, if there is one.
        kept: whether events are kept for ``take``.
    """

    def __init__(self, page_size: int, publisher: Publisher | None, *, kept: bool = False) -> None:
        self._page_size = page_size
        self._publisher = publisher
        self._keeps = kept
        self._kept: list[Event] = []

    def stored(self, before: bytes | None, keys: Sequence[bytes], token_ids: list[int]) -> None:
        """Pages have become findable.

        Args:
            before: the key of the page before them, if there is one.
            keys: theirs.
            token_ids: theirs, ``page_size`` for each key.
        """
        parent = None if before is None else name_of(before)
        self._tell(BlockStored([name_of(key) for key in keys], parent, token_ids, self._page_size))

    def removed(self, key: bytes) -> None:
        """A page can't be found any more."""
        self._tell(BlockRemoved([name_of(key)]))

    def take(self) -> list[Event]:
        """Events since the last time."""
        taken, self._kept = self._kept, []
        return taken

    def _tell(self, event: Event) -> None:
        if self._publisher is not None:
            self._publisher.put(event)
        if self._keeps:
            self._kept.append(event)


def kv_events(settings: Settings, model: str, page_size: int) -> KVEvents | None:
    """What the settings ask for, if anything.

    Args:
        settings: of the server.
        model: its name.
        page_size: tokens of a page.

    Raises:
        RefusedError: the package pyzmq is not installed, or an address can't be had.
    """
    if settings.kv_events is None:
        return None
    publisher = None
    if settings.kv_events != "grpc":
        topic = f"kv@{socket.gethostname()}@{model}"
        publisher = Publisher(settings.kv_events, settings.kv_events_replay or "", topic)
    return KVEvents(page_size, publisher, kept=settings.streams_kv_events)
