"""Looks at the server from outside while it is under load: health, metrics, memory."""

from __future__ import annotations

import contextlib
import threading
import time

import psutil

from longspan import Client, LongspanError
from tests.e2e.server import Server
from tests.soak.record import Memory, Record

_HEALTH_SECONDS = 0.1
_MEMORY_SECONDS = 1.0


class Watcher(threading.Thread):
    """Asks ten times a second for health, each second for metrics and memory, in a thread of its own.

    Args:
        server: to look at.
        record: notes what is seen.
        of_server: the server process's memory is added there.
        of_engine: that of its engines.

    Attributes:
        processes: the server's processes, all that were seen.
    """

    def __init__(
        self, server: Server, record: Record, of_server: list[Memory], of_engine: list[Memory]
    ) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._record = record
        self._of_server, self._of_engine = of_server, of_engine
        self._end = threading.Event()
        self.processes: set[psutil.Process] = set()

    def run(self) -> None:
        """The thread's work."""
        remember = 0.0
        with Client(self._server.host, self._server.port, timeout=10, retries=False) as client:
            while not self._end.wait(_HEALTH_SECONDS):
                begun = time.monotonic()
                try:
                    client.health()
                    self._record.now.health.append(time.monotonic() - begun)
                except LongspanError:
                    self._record.now.unanswered += 1
                if begun >= remember:
                    remember = begun + _MEMORY_SECONDS
                    self._look(begun)

    def end(self) -> None:
        """Ends the thread."""
        self._end.set()
        self.join()

    def _look(self, now: float) -> None:
        try:
            self._server.metrics()
        except OSError as error:
            self._record.now.wrong.append(f"/metrics: {error}")
        server = psutil.Process(self._server.process.pid)
        self._of_server.append(Memory(now, server.pid, server.memory_info().rss))
        self.processes |= {server, *server.children(recursive=True)}
        with contextlib.suppress(IndexError, psutil.NoSuchProcess):  # between two engines
            engine = psutil.Process(self._server.engine_pid)
            self._of_engine.append(Memory(now, engine.pid, engine.memory_info().rss))
