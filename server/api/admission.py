"""Which requests may enter: bounds on what is in flight, of all and of one identity, and unique names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from server.access.callers import Caller
from server.access.quota import LimitError
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
        self._requests: dict[tuple[str, str], Request] = {}
        self._last_release: float | None = None
        self._interval = 1.0
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, caller: Caller, request_id: str) -> Request | None:
        """The caller's request of this name, if it is in flight; others' names are theirs."""
        return self._requests.get((caller.identity.name, request_id))

    def fail_all(self, error: errors.ServiceError) -> None:
        """Ends every request in flight with ``error``."""
        for request in list(self._requests.values()):
            request.fail(error)

    async def wait_empty(self) -> None:
        """Waits until no request is in flight."""
        await self._empty.wait()

    @contextmanager
    def admit(self, caller: Caller, request_id: str, request: Request, sequences: int) -> Iterator[None]:
        """Counts a request of that many sequences as in flight for the duration of the block.

        Raises:
            ServiceError: the caller has a request of this name, or reached a limit; or there is no room.
        """
        key = caller.identity.name, request_id
        if key in self._requests:
            raise errors.request_id_in_use(request_id)
        with self._limits():
            caller.quota.check(caller.identity)
        if self.sequences + sequences > self.limit:
            missing = self.sequences + sequences - self.limit
            raise errors.queue_full(self.sequences, self.limit, self._retry_seconds(missing))
        self._requests[key] = request
        caller.quota.in_flight += 1
        self._empty.clear()
        self.sequences += sequences
        tells_pace = True
        try:
            yield
        except errors.ServiceError:
            # One that is refused after all ends at once, which tells nothing of when there is room.
            tells_pace = False
            raise
        finally:
            del self._requests[key]
            caller.quota.in_flight -= 1
            caller.quota.claims.pop(request_id, None)
            if not self._requests:
                self._empty.set()
            self.sequences -= sequences
            if tells_pace:
                self._released(sequences)

    def claim(self, caller: Caller, request_id: str, tokens: int) -> None:
        """Has a request in flight claim so many tokens of the KV cache, until it ends.

        Raises:
            ServiceError: the caller's requests may not claim as many.
        """
        most = caller.identity.kv_tokens
        if most is not None and tokens > most:
            raise errors.claim_too_large(tokens, most)
        with self._limits():
            caller.quota.claim(caller.identity, request_id, tokens)

    @contextmanager
    def _limits(self) -> Iterator[None]:
        try:
            yield
        except LimitError as error:
            seconds = self._retry_seconds(1) if error.retry_seconds is None else error.retry_seconds
            raise errors.limit_reached(str(error), error.reason, error.limit, seconds) from error

    def _released(self, sequences: int) -> None:
        now = time.monotonic()
        if self._last_release is not None:
            interval = (now - self._last_release) / sequences
            # A long gap says that there was nothing to do, not that the work was slow.
            self._interval += _NEWEST * (min(interval, _RETRY_SECONDS[1]) - self._interval)
        self._last_release = now

    def _retry_seconds(self, missing: int) -> float:
        """When that many sequences will have ended, going by the pace at which they ended lately."""
        least, most = _RETRY_SECONDS
        return min(max(missing * self._interval, least), most)
