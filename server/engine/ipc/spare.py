"""An engine process that is started ahead, since most of a start is importing."""

from __future__ import annotations

import logging
from pathlib import Path

from server.engine.ipc.spawn import Spawned, spawn_engine

log = logging.getLogger("longspan.server")


class Spare:
    """At most one process that waits for its ``Launch``.

    Args:
        threads: of the settings.
        cache_dir: of the settings.
        spawned: one to begin with.
    """

    def __init__(self, threads: int | None, cache_dir: Path, spawned: Spawned | None) -> None:
        self._threads = threads
        self._cache_dir = cache_dir
        self._spawned = spawned

    def keep(self) -> None:
        """Starts one where none runs; where that fails, the log says so."""
        if self._spawned is not None and self._spawned.process.poll() is not None:
            self.end()
        if self._spawned is None:
            try:
                self._spawned = spawn_engine(self._threads, self._cache_dir)
            except OSError as error:
                log.warning("no engine process can be started ahead of need: %s", error)

    def take(self) -> Spawned | None:
        """The process, if there is one that still runs; it is the caller's from now on."""
        spawned, self._spawned = self._spawned, None
        if spawned is None or spawned.process.poll() is None:
            return spawned
        spawned.end()  # it has ended, as where memory ran out
        return None

    def end(self) -> None:
        """Ends it."""
        if (spawned := self.take()) is not None:
            spawned.end()
