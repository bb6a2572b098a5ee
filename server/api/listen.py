"""The gRPC server: its options, its services, its port."""

from __future__ import annotations

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from longspan.v1 import inference_pb2_grpc
from server.api.health import READINESS, HealthServicer
from server.api.interceptor import Interceptor
from server.api.service import InferenceServicer
from server.errors import RefusedError
from server.observe.metrics import GrpcMetrics

# A token id takes up to 5 bytes on the wire and a token of text about as many; 16 MiB is a prompt of some
# three million tokens. The context length would bound it closer, but is known only later.
MAX_REQUEST_BYTES = 16 << 20

_OPTIONS = (
    # A second server on the same port would bind it without a word, and take half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    # A client that is gone without a word is noticed after 20 + 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients may ping as often as every 5 s, also while no call is in flight.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def listen(
    host: str, port: int, service: InferenceServicer, health: HealthServicer, metrics: GrpcMetrics
) -> tuple[aio.Server, int]:
    """A server that is bound and not started; port 0 takes a free one.

    Returns:
        The server and its port.

    Raises:
        RefusedError: the address can't be had.
    """
    server = aio.server(interceptors=(Interceptor(metrics),), options=_OPTIONS)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (READINESS, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise RefusedError(
            f"gRPC can't listen on {address}; another process may use the port: choose one with --host and "
            "--port, or 0 for any that is free"
        ) from error
    return server, bound
