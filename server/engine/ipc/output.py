"""The engine's output for a request's sequences, until they end or the engine does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from server.messages import SequenceOutput


class EngineDeadError(Exception):
    """The engine process has ended; the message is a sentence."""


class OutputStream:
    """Output of some sequences, each with the time of its step, for one reader.

    Args:
        ids: of the sequences.
        forget: called with the ids of those that are aborted.
    """

    def __init__(self, ids: list[int], forget: Callable[[list[int]], None]) -> None:
        self._forget = forget
        self._open = set(ids)
        self._outputs: deque[tuple[SequenceOutput, float]] = deque()
        self._error: EngineDeadError | None = None
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: SequenceOutput, when: float) -> None:
        """Called by the link."""
        self._outputs.append((output, when))
        self._wake()

    def fail(self, error: EngineDeadError) -> None:
        """Called by the link: nothing more comes."""
        self._error = error
        self._wake()

    async def take(self, most: int) -> list[tuple[SequenceOutput, float]]:
        """The output since the last call, at most ``most`` entries; waits until there is some.

        Returns:
            Output in order; none when all sequences have finished or were aborted.

        Raises:
            EngineDeadError: the engine died before all sequences had finished.
        """
        while self._open:
            taken: list[tuple[SequenceOutput, float]] = []
            while self._outputs and len(taken) < most:
                item = self._outputs.popleft()
                if item[0].id not in self._open:
                    continue  # it was aborted while this was under way
                if item[0].finish is not None:
                    self._open.discard(item[0].id)
                taken.append(item)
            if taken:
                return taken
            if self._error is not None:
                self._open.clear()
                raise self._error
            self._reader = self._loop.create_future()
            await self._reader
        return []

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def abort(self, ids: list[int] | None = None) -> None:
        """Forgets all of the sequences, or those named, here and in the engine; harmless when repeated."""
        aborted = self._open & set(ids) if ids is not None else set(self._open)
        self._open -= aborted
        self._forget(sorted(aborted))
        if not self._open:
            self._wake()
