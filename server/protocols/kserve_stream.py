"""Requests of one stream, answered side by side: responses come as they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

# Requests of a stream that are worked on at a time; further ones are not read until one has ended.
_AT_ONCE = 64


async def side_by_side(
    requests: AsyncIterator[_Request], answer: Callable[[_Request], AsyncGenerator[_Response, None]]
) -> AsyncGenerator[_Response, None]:
    """The responses to all requests of a stream, until these end and all are answered.

    Args:
        requests: of the stream; what reading them raises ends all.
        answer: gives the responses to one; raises nothing.
    """
    # One at a time: a client that does not read holds up its answers, and nothing piles up here.
    ready: asyncio.Queue[_Response | Exception | None] = asyncio.Queue(1)
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(responses: AsyncGenerator[_Response, None]) -> None:
        async with aclosing(responses):
            async for response in responses:
                await ready.put(response)

    async def work() -> None:
        tasks: set[asyncio.Task[None]] = set()
        end = None
        try:
            async for request in requests:
                await room.acquire()
                task = asyncio.create_task(one(answer(request)))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                task.add_done_callback(lambda _: room.release())
            await asyncio.gather(*tasks)
        except Exception as error:
            end = error
        finally:
            await _end(*tasks)
        await ready.put(end)

    working = asyncio.create_task(work())
    try:
        while (found := await ready.get()) is not None:
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        await _end(working)


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
