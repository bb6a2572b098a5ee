"""The server process's end of the link: starts the engine process, submits sequences, hands out output."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from server.background import in_thread
from server.engine.ipc.spawn import Spawned, spawn_engine
from server.engine.ipc.wire import ServerEnd
from server.errors import RefusedError
from server.messages import (
    Abort,
    Failed,
    FromEngine,
    Launch,
    Loading,
    Ready,
    SequenceOutput,
    Shutdown,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
)
from server.settings import Settings

log = logging.getLogger("longspan.link")

# An engine that was told to end finishes its step first; one that takes longer than this is killed.
_STOP_SECONDS = 10.0
# The last messages of an engine that has ended are read long before.
_LAST_WORDS_SECONDS = 0.5


class EngineDeadError(Exception):
    """The engine process has ended; the message is a sentence."""


class OutputStream:
    """Output of some sequences, each with the time of its step, for one reader."""

    def __init__(self, link: EngineClient, ids: list[int]) -> None:
        self._link = link
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
        self._link.abort(sorted(aborted))
        if not self._open:
            self._wake()


class EngineClient:
    """One engine process, used from one asyncio loop.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        spawned: what ``spawn_engine`` gave, if that was called already.

    Attributes:
        state: ``loading`` until the engine says it is ready; ``dead`` if it ended by itself.
        ready: its description of what it serves, once it is ready.
        progress: its last report while loading.
        stats: its load after the last step.
        on_step: called for the message of every step, before the streams get their output.
    """

    def __init__(self, settings: Settings, folder: Path, spawned: Spawned | None = None) -> None:
        self._settings = settings
        self._folder = folder
        self.state: Literal["loading", "ready", "dead", "stopped"] = "loading"
        self.ready: Ready | None = None
        self.progress: Loading | None = None
        self.stats = Stats()
        self.on_step: Callable[[StepOutput], None] | None = None
        self._streams: dict[int, OutputStream] = {}
        self._ids = itertools.count(1)
        self._ready_or_dead = asyncio.Event()
        self._dead = asyncio.Event()
        self._failure: Failed | None = None
        self._reason = ""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._spawned = spawned
        self._wire = ServerEnd(self._receive)
        self._exit: asyncio.Task[int] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts the process and returns at once; ``wait_ready`` tells how it went."""
        if self._spawned is None:
            self._spawned = spawn_engine(self._settings.threads, self._settings.cache_dir)
        self._exit = asyncio.create_task(in_thread(self._spawned.process.wait))
        await self._wire.connect(self._spawned.stream)
        self._send(Launch(str(self._folder), self._settings.model_dump_json()))
        self._tasks = [asyncio.create_task(self._watch())]

    async def wait_ready(self) -> Ready:
        """Waits until the engine serves.

        Raises:
            RefusedError: it said why it can't.
            EngineDeadError: it died without a reason.
        """
        await self._ready_or_dead.wait()
        if self.ready is not None and self.state == "ready":
            return self.ready
        if self._failure is not None:
            raise RefusedError(self._failure.message)
        raise EngineDeadError(self._reason)

    async def wait_dead(self) -> str:
        """Waits until the process has ended without being told to, and says how in a sentence."""
        await self._dead.wait()
        return self._reason

    def new_ids(self, count: int) -> list[int]:
        """Ids for ``count`` sequences."""
        return list(itertools.islice(self._ids, count))

    def submit(self, sequences: list[Submit]) -> OutputStream:
        """Queues sequences in the engine.

        Raises:
            EngineDeadError: there is no engine that serves.
        """
        if self.state != "ready":
            raise EngineDeadError(self._reason or f"the engine is {self.state}")
        stream = OutputStream(self, [sequence.id for sequence in sequences])
        for sequence in sequences:
            self._streams[sequence.id] = stream
            self._send(sequence)
        return stream

    def abort(self, ids: list[int]) -> None:
        """Forgets sequences; unknown ones are ignored."""
        known = [sequence_id for sequence_id in ids if self._streams.pop(sequence_id, None)]
        if known and self.state == "ready":
            self._send(Abort(known))

    async def stop(self) -> None:
        """Ends the process: by a message, then by a signal. Open streams end with ``EngineDeadError``."""
        if self.state == "stopped" or self._exit is None:
            return
        was, self.state = self.state, "stopped"
        if was in ("ready", "loading"):
            if was == "ready":
                self._send(Shutdown())
            else:
                self._kill()
            await asyncio.wait({self._exit}, timeout=_STOP_SECONDS)
            if not self._exit.done():
                log.warning("the engine did not end within %.0f s and is killed", _STOP_SECONDS)
                self._kill()
                await self._exit
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end_streams("the server is shutting down")
        self._ready_or_dead.set()
        self._wire.close()

    def _kill(self) -> None:
        if self._spawned is not None:
            self._spawned.process.kill()

    def _send(self, message: Launch | ToEngine) -> None:
        self._wire.send(self._encoder.encode(message))

    def _receive(self, payload: bytearray) -> None:
        message = self._decoder.decode(payload)
        if isinstance(message, StepOutput):
            self._deliver(message)
        elif isinstance(message, Ready):
            self.ready, self.state = message, "ready"
            self._ready_or_dead.set()
        elif isinstance(message, Failed):
            self._failure = message
        else:
            self.progress = message

    def _deliver(self, output: StepOutput) -> None:
        self.stats = output.stats
        if self.on_step is not None:
            self.on_step(output)
        for item in output.sequences:
            stream = self._streams.get(item.id)
            if stream is None:
                continue  # aborted while the step ran
            if item.finish is not None:
                del self._streams[item.id]
            stream.put(item, output.time)

    async def _watch(self) -> None:
        assert self._exit is not None
        code = await asyncio.shield(self._exit)
        if self.state == "stopped":
            return
        with contextlib.suppress(TimeoutError):  # its last message says more than its exit code
            await asyncio.wait_for(self._wire.lost.wait(), _LAST_WORDS_SECONDS)
        self.state = "dead"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._reason = self._failure.message if self._failure else f"the engine process {how}"
        self._end_streams(self._reason)
        self._ready_or_dead.set()
        self._dead.set()

    def _end_streams(self, reason: str) -> None:
        for stream in set(self._streams.values()):
            stream.fail(EngineDeadError(reason))
        self._streams.clear()
