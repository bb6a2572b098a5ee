"""Writes each page of an engine's KV cache, so that memory that grows later is not that of its pages."""

from __future__ import annotations

import asyncio
import random
import time

from longspan import AsyncClient, LongspanError
from tests.soak.record import Record

# Pages of one prompt, at most: a few steps' tokens, beside which users go on.
_MOST_PAGES = 64
_LOOK_SECONDS = 0.2


class Filler:
    """A client that sends an engine prompts that no other client sends, until each page has held one of them.

    An operating system gives a page memory when it is first written, and the engine takes pages that were
    written before first: the users' few prompts would go on for an hour until they have written all. Prompts
    stay cached. So where these have as many pages as there are, either all are cached at once, or one was
    evicted for another, which happens only where none is left that was never used.

    Args:
        client: of the server.
        record: its last engine is the one to fill; notes when each was full.
        rng: draws the prompts.

    Attributes:
        ended: set to end.
    """

    def __init__(self, client: AsyncClient, record: Record, rng: random.Random) -> None:
        self._client = client
        self._record = record
        self._rng = rng
        self.ended = False

    async def run(self) -> None:
        """Fills the cache of each engine that comes, until told to end."""
        info = await self._client.model_info()
        load = (await self._client.server_info()).load
        # One token more than full pages, and one for the answer.
        pages = min(_MOST_PAGES, (info.context_length - 2) // load.page_size)
        process, left = 0, 0
        while not self.ended:
            if self._engine() != process:
                process, left = self._engine(), load.pages_total
            if not process or process in self._record.full:
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            ids = [self._rng.randrange(3, info.vocabulary_size) for _ in range(pages * load.page_size + 1)]
            try:
                await self._client.generate(ids, max_tokens=1, timeout=60)
                left -= pages
            except LongspanError:  # the engine is lost, or a crowd has the queue
                await asyncio.sleep(_LOOK_SECONDS)
            if left <= 0 and self._engine() == process:
                self._record.full[process] = time.monotonic()

    def _engine(self) -> int:
        """The process of the engine that was seen last."""
        return self._record.engine[-1].process if self._record.engine else 0
