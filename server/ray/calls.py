"""The methods of a server that Ray's proxy calls, in place of a port of gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health_pb2_grpc

from longspan.v1 import encoder_pb2_grpc, inference_pb2_grpc
from server.access.callers import Callers
from server.access.certificates import Certificates
from server.api.encoder_service import EncoderServicer
from server.api.health import HealthServicer
from server.api.interceptor import Interceptor
from server.api.other_service import OtherService
from server.api.service import InferenceServicer
from server.api.state import ServerState
from server.observe.metrics import GrpcMetrics
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


class Calls:
    """As ``Listener``, without a port: calls come from ``answer``.

    The interceptor is the one of every other server, so are identities, limits, statuses and metrics.
    """

    def __init__(
        self,
        host: str,
        port: int,
        state: ServerState,
        service: InferenceServicer,
        health: HealthServicer,
        metrics: GrpcMetrics,
        callers: Callers,
        certificates: Certificates | None = None,
        others: Sequence[OtherService] = (),
    ) -> None:
        """Takes the parts of a server, as ``Listener`` does; certificates and others are refused before."""
        assert certificates is None
        assert not others
        self.port = port
        handlers: Any = _Handlers()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, handlers)
        encoders = EncoderServicer(state, service.accounts)
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(encoders, handlers)
        health_pb2_grpc.add_HealthServicer_to_server(health, handlers)
        self._handlers: _Handlers = handlers
        self._interceptor = Interceptor(state, metrics, service.accounts, callers)

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
