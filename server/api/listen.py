"""The gRPC server: its options, its services, its port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from longspan.v1 import encoder_pb2_grpc, inference_pb2_grpc
from server.access.callers import Callers
from server.access.certificates import Certificates, Pem
from server.api.encoder_service import EncoderServicer
from server.api.health import ENCODERS, READINESS, HealthServicer
from server.api.interceptor import Interceptor
from server.api.limits import MOST_REQUEST_BYTES
from server.api.service import InferenceServicer
from server.api.state import ServerState
from server.errors import RefusedError
from server.observe.metrics import GrpcMetrics

Listen = Callable[[int], tuple[aio.Server, int]]
"""``listen`` with all but the port."""

_OPTIONS = (
    # A second server on the same port would bind it without a word, and take half of the calls.
    ("grpc.so_reuseport", 0),
    # A client that is gone without a word is noticed after 20 + 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients may ping as often as every 5 s, also while no call is in flight.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def listen(
    host: str,
    port: int,
    state: ServerState,
    service: InferenceServicer,
    health: HealthServicer,
    metrics: GrpcMetrics,
    callers: Callers,
    certificates: Certificates | None = None,
) -> tuple[aio.Server, int]:
    """A server that is bound and not started; port 0 takes a free one.

    The model's context bounds a message closer than gRPC does, but is known only later (``check_message``).
    With ``certificates`` it speaks TLS, else plain text. ``Callers()`` opens it to all.

    Returns:
        The server and its port.

    Raises:
        RefusedError: the address can't be had.
    """
    most = state.settings.max_request_bytes or MOST_REQUEST_BYTES
    options = (*_OPTIONS, ("grpc.max_receive_message_length", most))
    interceptor = Interceptor(state, metrics, service.accounts, callers)
    server = aio.server(interceptors=(interceptor,), options=options)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(EncoderServicer(state, service.accounts), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if state.settings.reflection:
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection(
            (READINESS, ENCODERS, health_name, reflection.SERVICE_NAME), server
        )
    _refuse_taken(host, port)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if certificates is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, _credentials(certificates))
    except RuntimeError as error:
        raise RefusedError(_cannot(host, port, "gRPC does not say why")) from error
    return server, bound


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Credentials that take changed files at the next connection; those that are open keep what they have."""

    def configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.client_ca)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        renewed = certificates.renewed()
        return None if renewed is None else configuration(renewed)

    return grpc.dynamic_ssl_server_credentials(
        configuration(certificates.pem),
        fetch,  # type: ignore[arg-type]  # gRPC documents None for no change
        require_client_authentication=certificates.pem.client_ca is not None,
    )


def _refuse_taken(host: str, port: int) -> None:
    """Refuses an address that can't be had, before gRPC would log it past every logger.

    Raises:
        RefusedError: no address of the host can be listened on.
    """
    reasons = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise RefusedError(_cannot(host, port, error.strerror or str(error))) from error
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: connections that wait for their end must not keep the port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except OSError as error:
            reasons.append(error.strerror or str(error))
        else:
            return
    raise RefusedError(_cannot(host, port, " and ".join(dict.fromkeys(reasons))))


def _cannot(host: str, port: int, reason: str) -> str:
    return (
        f"gRPC can't listen on {host}:{port} ({reason}); choose another address with --host and --port "
        "(0 for any port that is free), or end what uses this one"
    )


async def end_of(server: aio.Server) -> str:
    """Waits until a server takes no more calls, and tells why."""
    try:
        # Unshielded, a wait that is cancelled would cancel the server's own.
        await asyncio.shield(server.wait_for_termination())
    except Exception as error:  # whatever has ended its loop
        return str(error)
    return "it was stopped"
