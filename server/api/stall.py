"""A limit for clients that do not read what is sent to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.api import errors

log = logging.getLogger("longspan.server")

STALL_SECONDS = 30.0
"""How long a message may wait for a client to make room for it. gRPC buffers some megabytes first."""

SENDING_SECONDS = 120.0
"""How long sending the answer of a call that does not stream may take. gRPC does not tell how far it is."""


def end_unless_sent() -> None:
    """Ends the call that this task serves if its answer, which comes next, is not sent in time."""
    task = asyncio.current_task()
    assert task is not None

    def end() -> None:
        log.info("an answer was not read within %.0f s, so its call was ended", SENDING_SECONDS)
        task.cancel()

    timer = asyncio.get_running_loop().call_later(SENDING_SECONDS, end)
    task.add_done_callback(lambda _: timer.cancel())


class StallWatch:
    """Looks now and then whether a write is overdue: a timer for a call, and none for each of its messages.

    Attributes:
        begun: when the write that is under way began; ``None`` while there is none.
        time: the clock.
    """

    def __init__(self, limit: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        self.begun: float | None = None
        self.time = loop.time
        self._limit = limit
        self._call_at = loop.call_at
        self._timer = self._call_at(self.time() + STALL_SECONDS, self._look)

    def _look(self) -> None:
        now = self.time()
        end = (now if self.begun is None else self.begun) + STALL_SECONDS
        if end <= now:
            self._limit.reschedule(now)
        else:
            self._timer = self._call_at(end, self._look)

    def close(self) -> None:
        """Looks no more."""
        self._timer.cancel()


@asynccontextmanager
async def stall_watch() -> AsyncIterator[StallWatch]:
    """Ends what is inside with an error once a write has been under way for ``STALL_SECONDS``."""
    try:
        async with asyncio.timeout(None) as limit:
            watch = StallWatch(limit)
            try:
                yield watch
            finally:
                watch.close()
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise errors.stalled(STALL_SECONDS) from error
