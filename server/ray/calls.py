"""The methods of a server that Ray's proxy calls, in place of a port of gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc

from server.api.listen import Listening, Parts
from server.ray.context import Answer, CallContext
from server.ray.frames import Pairs


class _Details(NamedTuple):
    """As ``grpc.HandlerCallDetails``."""

    method: str
    invocation_metadata: Pairs


class _Handlers:
    """As a gRPC server, to which generated code adds services: keeps the handlers by full name."""

    def __init__(self) -> None:
        self._found: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Takes a service's handlers."""
        self._found.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """The same handlers once more."""

    async def find(self, details: Any) -> Any:
        """The handler of a call."""
        return next((known for each in self._found if (known := each.service(details)) is not None), None)


class Calls(Listening):
    """As ``Listener``, without a port: calls come from ``answer``.

    The interceptor is the one of every other server, so are identities, limits, statuses and metrics.
    """

    def __init__(self, parts: Parts) -> None:
        """Takes the parts of a server, as ``Listener`` does; certificates and others are refused before."""
        assert parts.certificates is None
        assert not parts.others
        super().__init__(parts)
        self._handlers = _Handlers()
        self._add_services(self._handlers)

    async def start(self) -> None:
        """Nothing is to be bound."""

    async def renew(self) -> None:
        """The proxy's largest message is its own."""

    async def stop(self, grace: float) -> None:
        """Ray ends calls itself."""

    async def answer(self, method: str, payload: bytes, metadata: Pairs, peer: str, answer: Answer) -> None:
        """Answers one call, as a task of its own: who calls and what is counted belongs to the task.

        Args:
            method: its full name, ``/package.Service/Method``.
            payload: the serialized request.
            metadata: the client's, with ``context.DEADLINE``.
            peer: the client's address.
            answer: gets all that is sent, the end included.
        """
        details: Any = _Details(method, metadata)
        plain = await self._handlers.find(details)
        handler = await self._interceptor.intercept_service(self._handlers.find, details)
        context = CallContext(metadata, peer, answer, plain.response_serializer)
        if handler.unary_unary is not None:
            await context.respond(handler.unary_unary, payload, unary=True)
        else:
            # A refusal's handler is one of two streams.
            await context.respond(handler.unary_stream or handler.stream_stream, payload, unary=False)
