"""The server process's end of the link: starts the engine process, submits sequences, hands out output."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from server.background import in_thread
from server.encoder_messages import Encode
from server.engine.ipc.output import EngineDeadError, OutputStream
from server.engine.ipc.spawn import STACKS_SIGNAL, Spawned, spawn_engine
from server.engine.ipc.watch import LOOK_SECONDS, Watch
from server.engine.ipc.wire import LostFrameError, ServerEnd
from server.errors import RefusedError
from server.messages import (
    Abort,
    Failed,
    FromEngine,
    Launch,
    Loading,
    Ready,
    Shutdown,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
)
from server.settings import Settings

log = logging.getLogger("longspan.link")

# An engine that was told to end finishes its step first; one that takes longer than this is killed.
_STOP_SECONDS = 1.0
# An engine reports that it loads as soon as it has imported torch, which a slow disk may hold up.
_ANSWER_SECONDS = 300.0
# A hung engine writes its stacks before it is killed.
_STACKS_SECONDS = 0.2
# The last messages of an engine that has ended are read long before.
_LAST_WORDS_SECONDS = 0.5


class EngineClient:
    """One engine process, used from one asyncio loop.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        spawned: what ``spawn_engine`` gave, if that was called already.

    Attributes:
        state: ``loading`` until the engine says it is ready; ``dead`` if it ended by itself, or hung.
        ready: its description of what it serves, once it is ready.
        progress: its last report while loading.
        stats: its load after the last step.
        hung: whether it is dead because it hung.
        on_step: called for the message of every step, before the streams get their output.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        spawned: Spawned | None = None,
        tokenizer: Path | None = None,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._tokenizer = None if tokenizer is None else str(tokenizer)
        self.state: Literal["loading", "ready", "dead", "stopped"] = "loading"
        self.ready: Ready | None = None
        self.progress: Loading | None = None
        self.stats = Stats()
        self.hung = False
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
        self._watched: Watch | None = None
        self._sent = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts the process and returns at once; ``wait_ready`` tells how it went."""
        if self._spawned is None:
            self._spawned = spawn_engine(self._settings.threads, self._settings.cache_dir)
        self._exit = asyncio.create_task(in_thread(self._spawned.process.wait))
        self._watched = Watch(self._spawned.pulse, self._settings.engine_step_timeout)
        try:
            await self._wire.connect(self._spawned.stream)
        except BaseException:
            await self.stop()
            raise
        launch = Launch(str(self._folder), self._settings.model_dump_json(), self._tokenizer)
        self._wire.send(self._encoder.encode(launch))
        self._tasks = [asyncio.create_task(self._watch_end()), asyncio.create_task(self._watch_hangs())]

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

    @property
    def step_age(self) -> float:
        """For how long a serving engine has been in the same step or left a message unread, in seconds."""
        return self._watched.age if self._watched is not None and self.state == "ready" else 0.0

    async def wait_dead(self) -> str:
        """Waits until the engine has ended without being told to, or hangs, and says how in a sentence."""
        await self._dead.wait()
        return self._reason

    def new_ids(self, count: int) -> list[int]:
        """Ids for ``count`` sequences."""
        return list(itertools.islice(self._ids, count))

    def submit(self, sequences: Sequence[Submit | Encode]) -> OutputStream:
        """Queues sequences in the engine.

        Raises:
            EngineDeadError: there is no engine that serves.
        """
        if self.state != "ready":
            raise EngineDeadError(self._reason or f"the engine is {self.state}")
        ids = [id_ for sequence in sequences for id_ in sequence.ids]
        stream = OutputStream(ids, self.abort)
        self._streams.update(dict.fromkeys(ids, stream))
        for sequence in sequences:
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
        if was == "ready":
            self._send(Shutdown())
            await asyncio.wait({self._exit}, timeout=_STOP_SECONDS)
            if not self._exit.done():
                log.warning("the engine did not end within %.0f s and is killed", _STOP_SECONDS)
        self._wire.close()
        assert self._spawned is not None
        await in_thread(self._spawned.end)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._end_streams("the server is shutting down")
        self._ready_or_dead.set()

    def _send(self, message: ToEngine) -> None:
        self._sent += 1
        self._wire.send(self._encoder.encode(message))

    def _receive(self, payload: bytearray) -> None:
        try:
            message = self._decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise LostFrameError(f"a message can't be read ({error})") from error
        if isinstance(message, StepOutput):
            self._deliver(message)
        elif isinstance(message, Ready):
            if self.state == "loading":  # and not stopped meanwhile
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

    async def _watch_end(self) -> None:
        assert self._exit is not None
        code = await asyncio.shield(self._exit)
        if self.state in ("stopped", "dead"):
            return
        with contextlib.suppress(TimeoutError):  # its last message says more than its exit code
            await asyncio.wait_for(self._wire.lost.wait(), _LAST_WORDS_SECONDS)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if self._failure is not None:
            self._give_up(self._failure.message)
        else:
            self._give_up(self._wire.broken or f"the engine process {how}")

    async def _watch_hangs(self) -> None:
        assert self._spawned is not None
        how = await self._hang_in_loading() or await self._hang_in_steps()
        if how is None or (was := self.state) not in ("loading", "ready"):
            return
        if self.progress or self.ready:  # else there may be no handler yet, which writes them
            self._spawned.process.send_signal(STACKS_SIGNAL)
            await asyncio.sleep(_STACKS_SECONDS)
        if self.state == was:
            self.hung = True
            self._spawned.process.kill()
            self._give_up(f"the engine {how}")

    async def _hang_in_loading(self) -> str | None:
        """In what it hangs while it loads; ``None`` once that has ended. Time counts as in ``Watch``."""
        most = self._settings.engine_load_timeout or math.inf
        launch = most if math.isinf(most) else min(most, _ANSWER_SECONDS)
        stage, age = self.progress, 0.0
        while not self._ready_or_dead.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready_or_dead.wait(), LOOK_SECONDS)
                break
            age = age + LOOK_SECONDS if self.progress is stage else 0.0
            stage = self.progress
            if age >= (launch if stage is None else most):
                at_it = "not answered its launch" if stage is None else f"been {stage.stage}"
                setting = "--engine-load-timeout" + ("" if age >= most else " 0 sets no limit")
                return f"has {at_it} for {age:.1f} s and was killed ({setting})"
        return None

    async def _hang_in_steps(self) -> str | None:
        """In what it hangs while it serves; ``None`` once that has ended."""
        assert self._watched is not None
        while self.state == "ready":
            if (how := self._watched.look(time.monotonic(), self._sent)) is not None:
                return f"{how} and was killed (--engine-step-timeout)"
            await asyncio.sleep(LOOK_SECONDS)
        return None

    def _give_up(self, reason: str) -> None:
        self.state, self._reason = "dead", reason
        self._end_streams(reason)
        self._ready_or_dead.set()
        self._dead.set()

    def _end_streams(self, reason: str) -> None:
        for stream in set(self._streams.values()):
            stream.fail(EngineDeadError(reason))
        self._streams.clear()
