"""The server's methods in Ray's gRPC proxy: calls are handed to Ray as bytes, and frames become answers.

Ray imports ``add_services`` by name, in each process of a proxy (``grpc_servicer_functions``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from server.api import errors
from server.api.stall import stall_watch
from server.ray.context import DEADLINE
from server.ray.frames import End, Frame, Pairs, read_frame, unpack
from server.ray.loopback import has_one_application
from server.ray.services import SERVICES, WATCH

FUNCTION = "server.ray.edge.add_services"
"""Where Ray finds it."""

_RETRY_SECONDS = 2.0
_LOST = (
    "the replica that worked on this has ended before the answer was complete; another one takes its place, "
    "so ask again"
)
_NO_APPLICATION = "the server is starting or shutting down and takes no requests; ask again"


def add_services(servicer: Any, server: Any) -> None:
    """Adds the services to Ray's gRPC server.

    Args:
        servicer: a mock of Ray's; its proxy answers.
        server: puts handlers of its own, which call replicas, in the place of ours.
    """
    server.add_generic_rpc_handlers((_Edge(),))


class _Edge(grpc.GenericRpcHandler):
    """Finds the handlers that the proxy has put in place of ours, and makes answers of their frames."""

    def __init__(self) -> None:
        # The name that Ray reads and writes, as of grpcio's own class.
        self._method_handlers = {
            f"/{service.full_name}/{method.name}": _placeholder(method.server_streaming)
            for service in SERVICES
            for method in service.methods
        }

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a call; ``None`` for methods of others."""
        method = handler_call_details.method
        found = self._method_handlers.get(method)
        if found is None:
            return None
        if method == WATCH:
            return grpc.unary_stream_rpc_method_handler(_refuse_watch)
        if found.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_stream(found.unary_stream))
        return grpc.unary_unary_rpc_method_handler(_unary(found.unary_unary))


def _placeholder(streaming: bool) -> Any:
    """A handler without parsing: a replica parses, once the message is within its limits."""

    async def absent(payload: bytes, context: Any) -> NoReturn:
        raise RuntimeError("this version of Ray Serve does not take handlers over as 2.60 does")

    make = grpc.unary_stream_rpc_method_handler if streaming else grpc.unary_unary_rpc_method_handler
    return make(absent)


def _unary(behavior: Any) -> Any:
    async def handle(payload: bytes, context: Any) -> bytes:
        call = _Call(context)
        answer = await behavior(payload, call)
        frame = read_frame(answer) if answer else Frame()
        await call.name(frame)
        await call.finish(frame.end)
        return frame.messages[0]

    return handle


def _stream(behavior: Any) -> Any:
    async def handle(payload: bytes, context: Any) -> None:
        call = _Call(context)
        frames = behavior(payload, call)
        end = None
        try:
            async with stall_watch() as watch:
                async for answer in frames:
                    frame = read_frame(answer)
                    await call.name(frame)
                    for message in frame.messages:
                        watch.begun = watch.time()
                        await context.write(message)
                        watch.begun = None
                    end = frame.end
        except errors.ServiceError as stalled:
            await _abandon(frames)
            await context.abort_with_status(stalled.status())
        except BaseException:
            await _abandon(frames)
            raise
        await call.finish(end)

    return handle


async def _abandon(frames: AsyncIterator[bytes]) -> None:
    """Has Ray cancel the replica's work: it does where a call is cancelled that waits for the next frame."""
    while True:
        step = asyncio.ensure_future(anext(frames))
        await asyncio.sleep(0)
        step.cancel()
        try:
            await step
        except (StopAsyncIteration, asyncio.CancelledError, RuntimeError):
            return


class _Call:
    """A call's context as the proxy gets it: what it sets is looked at before the client is told.

    Args:
        context: gRPC's.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._named = False
        self._code: Any = None
        self._details = ""
        given = [(key, value) for key, value in context.invocation_metadata() or () if key != DEADLINE]
        remaining = context.time_remaining()
        if remaining is not None:
            given.append((DEADLINE, f"{time.time() + remaining:.6f}"))
        self._metadata = given

    # What the proxy reads, to send it to the replica with the call.

    def invocation_metadata(self) -> Pairs:
        """The client's metadata, and its deadline."""
        return self._metadata

    def peer(self) -> str:
        """The client's address."""
        address: str = self._context.peer()
        return address

    def auth_context(self) -> dict[str, Any]:
        """Nothing: there is no TLS."""
        return {}

    def peer_identities(self) -> None:
        """Nothing."""

    def peer_identity_key(self) -> None:
        """Nothing."""

    def trailing_metadata(self) -> Pairs:
        """None yet."""
        return ()

    def code(self) -> Any:
        """The status that the proxy has set."""
        return self._code

    def details(self) -> str:
        """Its sentence."""
        return self._details

    # What the proxy sets.

    def set_code(self, code: Any) -> None:
        """Of the call as Ray sees it; a call that our services refuse is one that succeeds there."""
        self._code = code

    def set_details(self, details: str) -> None:
        """The sentence of it."""
        self._details = details

    def set_trailing_metadata(self, trailers: Pairs) -> None:
        """Ray's name of the request, which is not the one that our services tell."""

    def set_compression(self, compression: Any) -> None:
        """None is asked for."""

    async def name(self, frame: Frame) -> None:
        """Sends the headers that are in a frame."""
        if frame.headers is not None and not self._named:
            self._named = True
            await self._context.send_initial_metadata(unpack(frame.headers))

    async def finish(self, end: End | None) -> None:
        """Ends the call; returns where its status is OK.

        Args:
            end: as the replica has it; ``None`` if none came, and the proxy knows why.
        """
        if end is None:
            await self._fail()
        elif end.code:
            await self._context.abort(_CODES[end.code], end.details, unpack(end.trailers))
        else:
            self._context.set_trailing_metadata(unpack(end.trailers))

    async def _fail(self) -> NoReturn:
        code, details = self._code or grpc.StatusCode.INTERNAL, self._details
        if code is grpc.StatusCode.CANCELLED:
            raise asyncio.CancelledError
        if code is grpc.StatusCode.INTERNAL:
            # Replicas tell of their own failures in frames. Headers keep gRPC's clients from repeating a call
            # that may have ended the replica.
            if not self._named:
                await self._context.send_initial_metadata(())
            await self._context.abort_with_status(
                errors.unavailable("REPLICA_LOST", _LOST, _RETRY_SECONDS).status()
            )
        if code is grpc.StatusCode.NOT_FOUND and has_one_application():
            # Serve knows of none: it is not deployed yet, or deleted so that its replicas drain.
            code, details = grpc.StatusCode.UNAVAILABLE, _NO_APPLICATION
        if code is grpc.StatusCode.UNAVAILABLE:
            await self._context.abort_with_status(
                errors.unavailable("NO_REPLICA", details, _RETRY_SECONDS).status()
            )
        await self._context.abort(code, details)
        raise AssertionError


async def _refuse_watch(payload: bytes, context: Any) -> None:
    sentence = "behind Ray Serve health is not streamed; ask Check"
    error = errors.ServiceError(grpc.StatusCode.UNIMPLEMENTED, sentence, "NOT_OFFERED")
    await context.abort_with_status(error.status())


_CODES = {code.value[0]: code for code in grpc.StatusCode}
