"""Which requests may enter: a bound on the sequences in flight, and unique names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from server.api import errors

# Weight of the newest interval between two releases in their running mean.
_NEWEST = 0.2
_RETRY_SECONDS = (0.1, 60.0)


class Request(Protocol):
    """A request in flight, as others may act on it."""

    def abort(self) -> None:
        """Ends it as if it were complete, with the finish reason "aborted"."""

    def fail(self, error: errors.ServiceError) -> None:
        """Ends it with an error."""


class Admission:
    """The requests in flight.

    Attributes:
        limit: most sequences in flight, running and waiting ones together.
        sequences: how many are.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sequences = 0
        self._requests: dict[str, Request] = {}
        self._last_release: float | None = None
        self._interval = 1.0
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, request_id: str) -> Request | None:
        """The request of this name, if it is in flight."""
        return self._requests.get(request_id)

    def fail_all(self, error: errors.ServiceError) -> None:
        """Ends every request in flight with ``error``."""
        for request in list(self._requests.values()):
            request.fail(error)

    async def wait_empty(self) -> None:
        """Waits until no request is in flight."""
        await self._empty.wait()

    @contextmanager
    def admit(self, request_id: str, request: Request, sequences: int) -> Iterator[None]:
        """Counts a request of that many sequences as in flight for the duration of the block.

        Raises:
            ServiceError: the name is taken, or there is no room.
        """
        if request_id in self._requests:
            raise errors.request_id_in_use(request_id)
        if self.sequences + sequences > self.limit:
            raise errors.queue_full(self.sequences, self.limit, self._retry_seconds(sequences))
        self._requests[request_id] = request
        self._empty.clear()
        self.sequences += sequences
        try:
            yield
        finally:
            del self._requests[request_id]
            if not self._requests:
                self._empty.set()
            self.sequences -= sequences
            self._released(sequences)

    def _released(self, sequences: int) -> None:
        now = time.monotonic()
        if self._last_release is not None:
            interval = (now - self._last_release) / sequences
            # A long gap says that there was nothing to do, not that the work was slow.
            self._interval += _NEWEST * (min(interval, _RETRY_SECONDS[1]) - self._interval)
        self._last_release = now

    def _retry_seconds(self, sequences: int) -> float:
        """When enough sequences will have ended, going by the pace at which they ended lately."""
        least, most = _RETRY_SECONDS
        missing = self.sequences + sequences - self.limit
        return min(max(missing * self._interval, least), most)
