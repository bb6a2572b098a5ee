"""A service of another protocol beside Longspan's own, made from its descriptor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from server.api import errors


@dataclass(frozen=True, slots=True)
class OtherService:
    """A service to be added to gRPC's server.

    Attributes:
        name: its full name.
        handler: answers its methods.
        accounted: full names of its methods of which one call is one request to the engine.
    """

    name: str
    handler: grpc.GenericRpcHandler
    accounted: frozenset[str]


def other_service(
    descriptor: ServiceDescriptor, servicer: object, accounted: Collection[str]
) -> OtherService:
    """A service whose methods are those that ``servicer`` has by name; others are refused with a sentence.

    Args:
        descriptor: of the service.
        servicer: its methods take a request, or an iterator over requests, and the context.
        accounted: names of methods of which one call is one request to the engine.
    """
    name = descriptor.full_name
    handlers = {method.name: _handler(method, servicer) for method in descriptor.methods}
    paths = frozenset(f"/{name}/{method}" for method in accounted)
    return OtherService(name, grpc.method_handlers_generic_handler(name, handlers), paths)


def _handler(method: MethodDescriptor, servicer: object) -> Any:
    """The handler of one method, of the kind that its descriptor says."""
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    refusal = _refused_stream(method.full_name) if method.server_streaming else _refused(method.full_name)
    return kinds[method.client_streaming, method.server_streaming](
        getattr(servicer, method.name, refusal),
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def _refused(method: str) -> Any:
    async def refuse(request: Any, context: Any) -> NoReturn:
        raise errors.not_offered(method)

    return refuse


def _refused_stream(method: str) -> Any:
    async def refuse(request: Any, context: Any) -> AsyncIterator[Any]:
        raise errors.not_offered(method)
        yield

    return refuse
