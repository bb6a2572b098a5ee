"""A call in a replica, as the interceptor and the services see calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import grpc
from grpc import aio

from server.ray.frames import End, Frame, Pairs, end_of, pack

DEADLINE = "x-longspan-deadline"
"""Header from the proxy to a replica: the call's deadline in seconds since 1970, which Ray does not tell."""


class Answer:
    """The frames of one answer, made by the task that computes it and taken by another.

    What is not taken yet is one frame: where the proxy is slower than the engine frames are fewer and larger.
    """

    def __init__(self) -> None:
        self._frame = Frame(messages=[])
        self._changed = asyncio.Event()

    def headers(self, pairs: Pairs) -> None:
        """The call's initial metadata."""
        self._frame.headers = pack(pairs)
        self._changed.set()

    def message(self, payload: bytes) -> None:
        """Another message."""
        self._frame.messages.append(payload)
        self._changed.set()

    def end(self, end: End) -> None:
        """There is no more."""
        self._frame.end = end
        self._changed.set()

    async def take(self) -> Frame:
        """What there is, once there is any."""
        await self._changed.wait()
        self._changed.clear()
        frame, self._frame = self._frame, Frame(messages=[])
        return frame


class CallContext:
    """As ``grpc.aio.ServicerContext``: what of it this server uses.

    Args:
        metadata: the client's, and ``DEADLINE``.
        peer: the client's address, as the proxy saw it.
        answer: gets what is sent.
        serialize: a message of the method to bytes.
    """

    def __init__(
        self, metadata: Pairs, peer: str, answer: Answer, serialize: Callable[[Any], bytes] | None
    ) -> None:
        self._metadata = tuple((key, value) for key, value in metadata if key != DEADLINE)
        self._deadline = next((value for key, value in metadata if key == DEADLINE), None)
        self._peer = peer
        self._answer = answer
        self._serialize = serialize
        self._trailers: Pairs = ()

    def invocation_metadata(self) -> Pairs:
        """The client's metadata."""
        return self._metadata

    def peer(self) -> str:
        """The client's address."""
        return self._peer

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Nothing: the proxy speaks no TLS."""
        return {}

    def time_remaining(self) -> float | None:
        """Seconds until the call's deadline, by this machine's clock; ``None`` without one."""
        return None if self._deadline is None else float(self._deadline) - time.time()

    async def send_initial_metadata(self, pairs: Pairs) -> None:
        """Sends headers."""
        self._answer.headers(pairs)

    def set_trailing_metadata(self, pairs: Pairs) -> None:
        """Keeps trailers, which are sent at the end."""
        self._trailers = pairs

    async def write(self, message: Any) -> None:
        """Sends a message."""
        assert self._serialize is not None
        self._answer.message(self._serialize(message))

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """Ends the call.

        Raises:
            grpc.aio.AbortError: always.
        """
        self._answer.end(end_of(status, self._trailers))
        raise aio.AbortError

    async def respond(self, behavior: Any, payload: bytes | None, *, unary: bool) -> None:
        """Has a handler answer the call, to its end.

        Args:
            behavior: of a method's handler, as the interceptor gives it.
            payload: the serialized request.
            unary: whether it returns its only message.
        """
        with suppress(aio.AbortError):
            message = await behavior(payload, self)
            if unary:
                await self.write(message)
            self._answer.end(End(trailers=pack(self._trailers)))
