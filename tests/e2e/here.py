"""The whole of ``longspan serve`` within this process, its engine in a thread: a start takes no imports.

So hundreds of models can be started in a minute. The link, the engine's loop and gRPC are the real ones; of
the engine's process only what makes it one is left out.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import io
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import SHUT_RDWR, socket, socketpair
from typing import Any

import pytest
import torch
import transformers  # noqa: F401 (before two threads could: see server.text.light)

from server import app, closing
from server.access.granted import granted
from server.engine.ipc import link, process, spare, spawn
from server.engine.ipc.process import serve
from server.engine.ipc.pulse import Pulse, open_memory
from server.engine.ipc.spawn import Spawned
from server.engine.ipc.wire import EngineEnd
from server.errors import RefusedError
from server.settings import Settings
from tests.e2e.asked import Asked, ask_all
from tests.e2e.server import Running

_READY_SECONDS = 120.0
_Up = tuple[asyncio.AbstractEventLoop, app.Server]


class _Thread(threading.Thread):
    """An engine's life, with what the link asks of its process."""

    def __init__(self, stream: socket, pulse: Pulse) -> None:
        super().__init__(daemon=True)
        self.returncode: int | None = None
        self._stream, self._pulse = stream, pulse
        self.pid = os.getpid()
        self.start()

    def run(self) -> None:
        self.returncode = 1
        self.returncode = serve(EngineEnd(self._stream), self._pulse)

    def poll(self) -> int | None:
        return None if self.is_alive() else self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.is_alive():
            raise subprocess.TimeoutExpired("engine", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """It ends with its link."""

    def lose(self) -> None:
        """Ends its link, and so it."""
        self._stream.shutdown(SHUT_RDWR)
        self.join()


class _Lines(logging.Handler):
    """What is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextlib.contextmanager
def _logged(level: int) -> Iterator[list[str]]:
    """What Longspan logs meanwhile, of at least this level."""
    handler, log = _Lines(level), logging.getLogger("longspan")
    before = log.level
    log.setLevel(min(level, log.getEffectiveLevel()))
    log.addHandler(handler)
    try:
        yield handler.lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class Here(Running):
    """How to reach a server of this process, and its engine."""

    def __init__(self, up: _Up, engines: list[_Thread], lines: list[str]) -> None:
        self._up, self._engines, self._lines = up, engines, lines

    @property
    def log(self) -> str:
        """What this process has logged since its start."""
        return "\n".join(self._lines)

    def drain(self) -> None:
        """Has it end as by SIGTERM."""
        loop, server = self._up
        loop.call_soon_threadsafe(server.stop)

    def lose_engine(self) -> None:
        """Ends the engine that serves without telling it to, as where its process dies."""
        next(engine for engine in self._engines if engine.is_alive()).lose()


@contextlib.contextmanager
def _within(engines: list[_Thread]) -> Iterator[pytest.MonkeyPatch]:
    """Has servers start their engines as threads of this process, which are added to a list."""

    def spawn_engine(threads: int | None, cache_dir: Path) -> Spawned:
        ours, theirs = socketpair()
        memory = open_memory()
        pulse = Pulse(memory)
        os.close(memory)
        thread: Any = _Thread(theirs, pulse)
        engines.append(thread)
        return Spawned(thread, ours, pulse)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "spawn_engine", spawn_engine)
        patch.setattr(spare, "spawn_engine", spawn_engine)
        patch.setattr(process, "configure_logging", lambda *_: None)  # which is this process's own
        # A thread can't be killed: one that loads a model while its tokenizer is refused is waited for.
        patch.setattr(spawn, "KILL_SECONDS", _READY_SECONDS)
        patch.setattr(closing, "CLOSE_SECONDS", _READY_SECONDS)
        try:
            yield patch
        finally:
            gc.unfreeze()  # a server that serves for long keeps what it has loaded
            torch.set_num_threads(threads)  # its engine has set its own


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Here]:
    """A server in a thread of this process, from when it is ready until the block ends; it must end well.

    For what a server answers; its processes, signals and standard streams are for ``tests.e2e.server``.

    Args:
        settings: of the server, as ``Settings`` has them.

    Raises:
        RefusedError: the server can't serve with these settings.
    """
    given = Settings(port=0, metrics_port=0, check_integrity=True, **settings)
    up: concurrent.futures.Future[_Up] = concurrent.futures.Future()
    ended: concurrent.futures.Future[int] = concurrent.futures.Future()
    engines: list[_Thread] = []
    with _within(engines) as patch, _logged(logging.INFO) as lines:
        patch.setattr(app.Server, "_take_signals", lambda self: None)  # which only a main thread gets
        with contextlib.redirect_stdout(io.StringIO()) as said:
            threading.Thread(target=_live, args=(given, up, ended), daemon=True).start()
            # One that does not get ready in its time has as much again to end.
            concurrent.futures.wait(
                (up, ended), 2 * _READY_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            )
        if not up.done():
            raise AssertionError(f"it ended with {ended.result(0)} before it was ready")
        loop, server = up.result()
        try:
            running = Here((loop, server), engines, lines)
            assert running.read_ready(said.getvalue()), said.getvalue()
            yield running
        finally:
            with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended by itself
                loop.call_soon_threadsafe(server.end)
            code = ended.result(_READY_SECONDS)
        assert code == 0, "the engine ended by itself; the log says why"


def _live(
    settings: Settings, up: concurrent.futures.Future[_Up], ended: concurrent.futures.Future[int]
) -> None:
    """A server's life in a thread.

    Args:
        settings: of the server.
        up: gets its loop and the server once it is ready.
        ended: gets its exit code, or what it raised, when all of it has ended.
    """

    async def life() -> int:
        server = app.Server(settings, granted(settings))
        running = asyncio.create_task(server.run())
        await _until_ready(server, running)
        if not running.done():
            up.set_result((asyncio.get_running_loop(), server))
        return await running

    try:
        ended.set_result(asyncio.run(life()))
    except BaseException as error:
        ended.set_exception(error)


async def _until_ready(server: app.Server, life: asyncio.Task[int]) -> None:
    """Waits until a server is ready or has ended."""
    async with asyncio.timeout(_READY_SECONDS):
        while server.state.phase != "ready" and not life.done():  # noqa: ASYNC110 (no event tells of it)
            await asyncio.sleep(0.002)


def started_and_asked(settings: Settings) -> tuple[str, list[Asked], list[str]]:
    """Starts a server, asks it for all that its model can do, and ends it.

    Args:
        settings: of the server; without a port of its own.

    Returns:
        The sentence with which it refused to start, empty if it served; what was asked; and what should not
        have been.
    """
    with _within([]), _logged(logging.ERROR) as errors, contextlib.redirect_stdout(io.StringIO()):
        refusal, asked, wrong = asyncio.run(_started_and_asked(settings))
    return refusal, asked, [*wrong, *errors]


async def _started_and_asked(settings: Settings) -> tuple[str, list[Asked], list[str]]:
    server = app.Server(settings, granted(settings))
    life = asyncio.create_task(server.run())
    try:
        await _until_ready(server, life)
        if life.done():
            code = life.result()
            return "", [], [f"it ended with {code} before it was ready"]
        asked, wrong = await ask_all(f"127.0.0.1:{server.port}")
        if life.done():
            wrong.append("the engine has ended")
        return "", asked, wrong
    except RefusedError as refusal:
        return str(refusal), [], []
    finally:
        server.end()
        await asyncio.gather(life, return_exceptions=True)
