"""Server reflection by both of its names, v1 and v1alpha, whose messages are the same."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc import aio
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

_METHOD = "ServerReflectionInfo"
SERVICE_NAME = reflection.SERVICE_NAME.replace("v1alpha", "v1")
"""Of v1. grpcio-reflection (1.81) has v1alpha only."""


def add_reflection(names: Iterable[str], server: aio.Server) -> None:
    """Describes services, and itself, to clients that ask.

    Args:
        names: full names of the services.
        server: that gets it.
    """
    _describe()
    servicer = reflection_aio.ReflectionServicer((*names, SERVICE_NAME, reflection.SERVICE_NAME))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    services = (SERVICE_NAME, reflection.SERVICE_NAME)
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, {_METHOD: handler}) for name in services)
    )


def _describe() -> None:
    """Adds the descriptor of v1: that of v1alpha with other names."""
    pool, proto = descriptor_pool.Default(), FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(proto)
    text = text_format.MessageToString(proto).replace("v1alpha", "v1")
    pool.AddSerializedFile(text_format.Parse(text, FileDescriptorProto()).SerializeToString())
