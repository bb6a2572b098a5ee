"""A replica: a server, further models that calls name, and the methods that Ray's proxy calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from ray import serve
from starlette.responses import PlainTextResponse, Response

from longspan.v1 import inference_pb2
from server.access.callers import DeniedError
from server.api import errors
from server.errors import RefusedError
from server.observe.logging import configure_logging
from server.ray.answering import streamed, whole
from server.ray.frames import Frame, Pairs, refusal
from server.ray.hosted import Hosted
from server.ray.services import SERVICES, WATCH
from server.settings import Settings

log = logging.getLogger("longspan.ray")

_RETRY_SECONDS = 5.0
_ABORT = "/longspan.v1.InferenceService/Abort"


class Replica:
    """One replica. Its methods of gRPC are added below, by the names of the services' methods.

    Args:
        settings: of the server; replicas on one machine have ports of ``/metrics`` one after another.

    Raises:
        RefusedError: it can't serve with these settings.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        configure_logging(settings.log_level, settings.log_format)
        context = serve.get_replica_context()
        self._place = (context.deployment, context.app_name)
        port = settings.metrics_port and settings.metrics_port + context.rank.local_rank
        self._settings = settings.model_copy(update={"metrics_port": port})
        self._others: dict[str, Hosted] = {}
        self._main = Hosted(self._settings)
        await self._main.begin()
        if self._main.name in settings.ray_model:
            await self._main.finish()
            raise RefusedError(
                f"--ray-model {self._main.name}: the first model has this name, too; give another one"
            )
        if settings.metrics:
            log.info("metrics on http://%s:%d/metrics", settings.metrics_host, self._main.metrics_port)

    async def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises.

        Raises:
            RuntimeError: an engine is lost, and is not started again.
        """
        for server in (self._main, *self._others.values()):
            if server.ended:
                raise RuntimeError(server.state.failure or "the server has ended")

    async def __del__(self) -> None:
        """Ray calls it before it ends the process, once no call is under way."""
        await asyncio.gather(*(server.finish() for server in (self._main, *self._others.values())))

    async def __call__(self, request: Any) -> Response:
        """Ray's HTTP proxy calls it; no application can be left out there that its gRPC proxy has."""
        return PlainTextResponse("this application is asked by gRPC\n", 501)

    async def unary(self, method: str, payload: bytes, metadata: Pairs, peer: str) -> Frame:
        """Answers a call with one message.

        Args:
            method: its full name.
            payload: the serialized request.
            metadata: the client's.
            peer: the client's address.
        """
        server = await self._server(method, metadata)
        return server if isinstance(server, Frame) else await whole(server, method, payload, metadata, peer)

    async def stream(
        self, method: str, payload: bytes, metadata: Pairs, peer: str
    ) -> AsyncGenerator[Frame, None]:
        """Answers a call with a stream; arguments as of ``unary``."""
        server = await self._server(method, metadata)
        if isinstance(server, Frame):
            yield server
            return
        async with contextlib.aclosing(streamed(server, method, payload, metadata, peer)) as frames:
            async for frame in frames:
                yield frame

    async def abort(self, payload: bytes, metadata: Pairs, peer: str) -> Frame:
        """Ends a request by name, whichever replica it is in."""
        own = await self.abort_here(payload, metadata, peer)
        if own.end is None or own.end.code or _found(own):
            return own
        every = serve.get_deployment_handle(*self._place).broadcast(
            "abort_here", payload, list(metadata), peer
        )
        return next((frame for frame in await every.results_async() if _found(frame)), own)

    async def abort_here(self, payload: bytes, metadata: Pairs, peer: str) -> Frame:
        """Ends a request by name, of any model of this replica."""
        for server in (self._main, *self._others.values()):
            frame = await whole(server, _ABORT, payload, metadata, peer)
            if frame.end is None or frame.end.code or _found(frame):
                break
        return frame

    async def load(self, name: str) -> Hosted:
        """A server for a further model, ready.

        Raises:
            RefusedError: it can't be served.
        """
        other = {"model": self._settings.ray_model[name], "model_name": name, "metrics_port": 0}
        server = Hosted(self._settings.model_copy(update=other))
        try:
            await server.begin()
        except BaseException:  # the caller may have left meanwhile, too
            await server.finish()
            raise
        log.info("%s is ready, its metrics on port %d", name, server.metrics_port)
        self._others[name] = server
        return server

    async def other(self, name: str) -> Hosted:
        """The server for a further model; that with the bound on their number is in ``multiplexed``."""
        raise NotImplementedError(name)

    async def _server(self, method: str, metadata: Pairs) -> Hosted | Frame:
        """The server of the model that a call names, or why it has none."""
        name = serve.get_multiplexed_model_id()
        if not name or name == self._main.name or method.startswith("/grpc.health."):
            return self._main
        try:
            self._main.access.callers.by_token(metadata)  # before anything is loaded for the caller
        except DeniedError as error:
            return refusal(errors.unauthenticated(str(error)))
        if name not in self._settings.ray_model:
            known = ", ".join([self._main.name, *self._settings.ray_model])
            sentence = (
                f"multiplexed_model_id: there is no model named {errors.quote(name)}; there are {known}"
            )
            return refusal(errors.ServiceError(grpc.StatusCode.NOT_FOUND, sentence, "MODEL_NOT_FOUND"))
        try:
            return await self.other(name)
        except RefusedError as error:
            log.error("%s can't be served: %s", name, error)
            sentence = f"the model {name!r} could not be loaded; the server's log says why"
            return refusal(errors.unavailable("MODEL_NOT_LOADED", sentence, _RETRY_SECONDS))


def multiplexed(most: int) -> type[Replica]:
    """A kind of replica that has so many further models loaded at a time, at most."""

    class Multiplexed(Replica):
        """With a bound on further models: that least recently asked for makes room."""

        @serve.multiplexed(max_num_models_per_replica=most)  # type: ignore[untyped-decorator]
        async def _loaded(self, name: str) -> _Kept:
            return _Kept(self._others, name, await self.load(name))

        async def other(self, name: str) -> Hosted:
            kept: _Kept = await self._loaded(name)
            return kept.server

    return Multiplexed


class _Kept:
    """A loaded model, as Ray keeps it: it calls ``__del__`` in a thread when another takes its place."""

    def __init__(self, servers: dict[str, Hosted], name: str, server: Hosted) -> None:
        self.server = server
        self._servers = servers
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._ended = False

    def __del__(self) -> None:
        if self._ended or self._loop.is_closed():
            return
        self._ended = True
        end = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()  # collected as garbage in the loop, which must not wait for itself
            return
        end.result()

    async def _end(self) -> None:
        await self.server.finish()
        if self._servers.get(self._name) is self.server:
            del self._servers[self._name]
        log.info("%s has ended, to make room", self._name)


def _found(frame: Frame) -> bool:
    return bool(frame.messages) and inference_pb2.AbortResponse.FromString(frame.messages[0]).found


def _method(method: Any) -> Any:
    """A method as Ray calls it: with the request's bytes, and with ``grpc_context``, by this name."""
    path = f"/{method.containing_service.full_name}/{method.name}"

    if method.server_streaming:

        async def stream(self: Replica, payload: bytes, grpc_context: Any) -> AsyncGenerator[Frame, None]:
            async for frame in self.stream(
                path, payload, grpc_context.invocation_metadata(), grpc_context.peer()
            ):
                yield frame

        return stream

    async def unary(self: Replica, payload: bytes, grpc_context: Any) -> Frame:
        given = (payload, grpc_context.invocation_metadata(), grpc_context.peer())
        return await (self.abort(*given) if path == _ABORT else self.unary(path, *given))

    return unary


for _service in SERVICES:
    for _each in _service.methods:
        if f"/{_service.full_name}/{_each.name}" != WATCH:
            setattr(Replica, _each.name, _method(_each))
