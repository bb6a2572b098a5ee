"""Blocking work beside an asyncio loop, in threads that don't keep the process from ending."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")

_STDIN = 0


async def in_thread(work: Callable[[], _T]) -> _T:
    """Runs ``work`` in a thread, which ends with the process, as a pool's would not."""
    future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
    loop = future.get_loop()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="beside the loop", daemon=True).start()
    return await future


def for_other_loops(question: Callable[[], _T]) -> Callable[[], Awaitable[_T]]:
    """Has the running loop answer a question that is asked in loops of other threads.

    Asking raises ``RuntimeError`` once the loop is closed.

    Args:
        question: must not raise.
    """
    loop = asyncio.get_running_loop()

    async def ask() -> _T:
        answer: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def give() -> None:
            if answer.set_running_or_notify_cancel():
                answer.set_result(question())

        loop.call_soon_threadsafe(give)
        return await asyncio.wrap_future(answer)

    return ask


def when_stdin_ends(call: Callable[[], object]) -> None:
    """Has the running loop call ``call`` once when standard input has ended; earlier input is dropped.

    Every system reports a pipe's end, however the process that held its other end has died. The signal
    that Linux sends at a parent's death comes when the thread that started the child ends.
    """
    loop = asyncio.get_running_loop()

    def read() -> None:
        with contextlib.suppress(OSError):  # there is none, or a terminal that has closed
            while os.read(_STDIN, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(call)

    threading.Thread(target=read, name="stdin", daemon=True).start()
