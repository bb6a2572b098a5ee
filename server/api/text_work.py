"""Work on long texts beside the event loop: a few threads, and a bound on what waits for them.

The work itself must release the interpreter's lock, as tokenizing and decoding of batches do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from server.api import errors
from server.background import in_thread

_T = TypeVar("_T")

# More threads would take the cores from the engine, whose steps every stream waits for.
_THREADS = max(2, (os.cpu_count() or 1) // 8)
# Of longer texts one is worked on at a time: a tokenizer takes some 500 bytes for each token meanwhile.
_ONE_AT_A_TIME = 64 << 10
_MOST_JOBS = 64
_MOST_CHARACTERS = 16 << 20
_RETRY_SECONDS = 1.0


class TextWork:
    """Runs work on texts in threads, and refuses it where too much waits already.

    Args:
        threads: pieces of work done at once.
        most_jobs: pieces of work under way and waiting, at most.
        most_characters: characters, or token ids, of all of these together, at most; a single piece may have
            any number.

    Attributes:
        jobs: pieces of work under way and waiting.
    """

    def __init__(
        self,
        threads: int = _THREADS,
        most_jobs: int = _MOST_JOBS,
        most_characters: int = _MOST_CHARACTERS,
    ) -> None:
        self._free = asyncio.Semaphore(threads)
        self._long = asyncio.Semaphore(1)
        self._most = most_jobs, most_characters
        self.jobs = self._characters = 0

    async def run(self, work: Callable[[], _T], characters: int) -> _T:
        """Does one piece of work. A caller that is cancelled leaves the queue; a thread works to its end.

        Args:
            work: what to do.
            characters: of text, or token ids, that it is done with.

        Raises:
            ServiceError: too much waits.
        """
        jobs, most = self._most
        if self.jobs >= jobs or (self.jobs and self._characters + characters > most):
            raise errors.text_queue_full(self.jobs, _RETRY_SECONDS)
        self._count(1, characters)
        with ExitStack() as held:
            held.callback(self._count, -1, -characters)
            for place in (self._long, self._free) if characters > _ONE_AT_A_TIME else (self._free,):
                await place.acquire()
                held.callback(place.release)
            until_end = held.pop_all()
        job = asyncio.ensure_future(in_thread(work))

        def ended(job: asyncio.Future[_T]) -> None:
            until_end.close()
            if not job.cancelled():
                job.exception()  # seen, also if the caller has gone

        job.add_done_callback(ended)
        return await asyncio.shield(job)

    def _count(self, jobs: int, characters: int) -> None:
        self.jobs += jobs
        self._characters += characters
