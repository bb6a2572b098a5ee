"""Calls that a server answers in frames, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Protocol

import grpc

from server.api import errors
from server.ray.context import Answer
from server.ray.frames import End, Frame, Pairs, refusal

log = logging.getLogger("longspan.ray")


class Answering(Protocol):
    """A server without a port."""

    async def answer(self, method: str, payload: bytes, metadata: Pairs, peer: str, answer: Answer) -> None:
        """As ``Calls.answer``."""


async def whole(server: Answering, method: str, payload: bytes, metadata: Pairs, peer: str) -> Frame:
    """The answer of a call with one message; arguments as of ``Calls.answer``."""
    answer = Answer()
    task = asyncio.create_task(server.answer(method, payload, metadata, peer, answer))
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()
    if (end := _raised(task)) is not None:
        answer.end(end)
    return await answer.take()


async def streamed(
    server: Answering, method: str, payload: bytes, metadata: Pairs, peer: str
) -> AsyncGenerator[Frame, None]:
    """The answer of a call with a stream; closing it ends the call. Arguments as of ``Calls.answer``."""
    answer = Answer()
    task = asyncio.create_task(server.answer(method, payload, metadata, peer, answer))

    def ended(task: asyncio.Task[None]) -> None:
        if (end := _raised(task)) is not None:
            answer.end(end)

    task.add_done_callback(ended)
    try:
        while True:
            frame = await answer.take()
            yield frame
            if frame.end is not None:
                return
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def _raised(task: asyncio.Task[None]) -> End | None:
    """The end of a call whose task was cancelled, or raised past the interceptor."""
    if task.cancelled():
        return refusal(errors.ServiceError(grpc.StatusCode.CANCELLED, "the call was ended", "CANCELLED")).end
    if (error := task.exception()) is None:
        return None
    log.error("a call failed", exc_info=error)
    return refusal(errors.internal("")).end
