"""The gRPC server: its options, its services, its port."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longspan.v1 import encoder_pb2_grpc, inference_pb2_grpc
from server.access.callers import Callers
from server.access.certificates import Certificates, Pem
from server.api.encoder_service import EncoderServicer
from server.api.health import ENCODERS, READINESS, HealthServicer
from server.api.interceptor import Interceptor
from server.api.other_service import OtherService
from server.api.reflection import add_reflection
from server.api.service import InferenceServicer
from server.api.state import ServerState
from server.descriptors import connections_allowed
from server.errors import RefusedError
from server.observe import orca_messages
from server.observe.metrics import GrpcMetrics, Metrics
from server.observe.orca import LoadReports

_MOST_METADATA_BYTES = 16 << 10
_ANEW = "the server had it until it listened anew for the model, which it does not with --max-request-bytes"
_FREE_SECONDS, _LOOK_SECONDS = 1.0, 0.002
# Connections of streams from before a renewal count beside those after it, and both must leave descriptors.
_OLD_STREAMS_SECONDS = 10.0
_OPTIONS = (
    # A second server on the same port would bind it without a word, and take half of the calls.
    ("grpc.so_reuseport", 0),
    # A client that is gone without a word is noticed after 20 + 30 s. gRPC 1.82 heeds no timeout of keepalive
    # and waits 60 s for a ping's answer, which can come behind megabytes that a slow client still sends.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 30_000),
    # Clients may ping as often as every 5 s, also while no call is in flight.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Calls that this process has not looked at yet. Of more than gRPC's 1000 some would end with CANCELLED in
    # place of an answer or a refusal that says why: those of a burst, or of others while a client floods.
    ("grpc.server.max_pending_requests", 1 << 14),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 15),
    # Else gRPC ends calls beyond --max-streams-per-connection unseen, until their client knows of that limit.
    ("grpc.http.overload_protection", 0),
    # Between two different sizes gRPC would refuse at random.
    ("grpc.max_metadata_size", _MOST_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MOST_METADATA_BYTES),
    # A client may send 64 KiB of a message before it is read here; by default 4 MiB, while there is memory.
    # The rest of a message that is being read is asked for at once.
    ("grpc.http2.bdp_probe", 0),
    # A connection takes the place of another until it has begun to speak HTTP/2 (gRPC: 120 s).
    ("grpc.server_handshake_timeout_ms", 10_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What answers calls.

    Attributes:
        host: to listen on.
        port: of it; 0 takes a free one.
        state: of the server.
        service: answers requests.
        health: answers probes.
        metrics: of the calls.
        callers: who may call. ``Callers()`` opens it to all.
        certificates: it speaks TLS with these, or plain text without.
        others: services of other protocols.
    """

    host: str
    port: int
    state: ServerState
    service: InferenceServicer
    health: HealthServicer
    metrics: GrpcMetrics
    callers: Callers
    certificates: Certificates | None = None
    others: Sequence[OtherService] = ()


class Listening(ABC):
    """What calls come from: a ``Listener``, or another with the same parts.

    Attributes:
        port: once it has been bound, the one that it has.
    """

    def __init__(self, parts: Parts) -> None:
        state, accounts = parts.state, parts.service.accounts
        self.port, self._parts = parts.port, parts
        self._encoders = EncoderServicer(state, accounts)
        self._reports = _reports(state, accounts.metrics) if state.settings.load_reports else None
        accounted = frozenset[str]().union(*(other.accounted for other in parts.others))
        self._interceptor = Interceptor(
            state, parts.metrics, accounts, parts.callers, accounted, self._reports
        )

    def _add_services(self, server: Any) -> None:
        """Adds Longspan's own services, and that of health."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._parts.service, server)
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(self._encoders, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._parts.health, server)

    @abstractmethod
    async def start(self) -> None:
        """As ``Listener.start``."""

    @abstractmethod
    async def renew(self) -> None:
        """As ``Listener.renew``."""

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """As ``Listener.stop``."""


class Listener(Listening):
    """Answers on one port: by one gRPC server at a time, and by those before it while their calls last."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._servers: list[aio.Server] = []
        self._ends: list[asyncio.Task[None]] = []
        self._connections = 0
        if (certificates := parts.certificates) is not None:
            parts.metrics.certificate_expiry.labels("server").set_function(lambda: certificates.expiry)

    async def start(self) -> None:
        """Binds the port and answers; of messages over ``ServerState.received_bytes`` it reads the length.

        Raises:
            RefusedError: the address can't be had, or the process may open hardly any files.
        """
        if not self._servers:
            self._connections = connections_allowed(self._parts.state.settings.max_connections)
        server = self._bind()
        self._servers.append(server)
        await server.start()

    async def renew(self) -> None:
        """Starts again on the same port, since gRPC takes another ``ServerState.received_bytes`` only then.

        For some milliseconds no connection is taken. Those that are open get no more calls, and their clients
        connect again for the next one; a call that is under way may go on for a few seconds.

        Raises:
            RefusedError: another program has taken the port meanwhile.
        """
        self._ends.append(asyncio.create_task(self._servers[-1].stop(_OLD_STREAMS_SECONDS)))
        until = time.monotonic() + _FREE_SECONDS
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self.start()
            except RefusedError as error:
                if time.monotonic() > until:
                    raise RefusedError(f"{error} ({_ANEW})") from error
            else:
                return

    async def stop(self, grace: float) -> None:
        """Takes no more calls, and ends those that are under way after so many seconds."""
        await asyncio.gather(*(server.stop(grace) for server in self._servers), *self._ends)

    def _bind(self) -> aio.Server:
        state, host = self._parts.state, self._parts.host
        refuse_taken(host, self.port)
        options = (*_OPTIONS, *_limits(state, self._connections))
        server = aio.server(interceptors=(self._interceptor,), options=options)
        self._add_services(server)
        if self._reports is not None:
            server.add_generic_rpc_handlers((self._reports.handler(),))
        server.add_generic_rpc_handlers(tuple(other.handler for other in self._parts.others))
        if state.settings.reflection:
            reported = () if self._reports is None else (orca_messages.SERVICE,)
            health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            others = (other.name for other in self._parts.others)
            names = (READINESS, ENCODERS, *others, health_name, *reported)
            add_reflection(names, server)
        address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        try:
            if self._parts.certificates is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, _credentials(self._parts.certificates))
        except RuntimeError as error:
            raise RefusedError(_cannot(host, self.port, "gRPC does not say why")) from error
        return server


def _reports(state: ServerState, metrics: Metrics) -> LoadReports:
    """Reports of the engine's load."""
    return LoadReports(
        lambda: metrics.load, lambda: state.served.ready.max_running if state.served is not None else 1
    )


def _limits(state: ServerState, connections: int) -> list[tuple[str, int]]:
    """Options of gRPC that follow from settings and the model."""
    settings = state.settings
    limits = [
        ("grpc.max_receive_message_length", state.received_bytes),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        ("grpc.max_connection_idle_ms", round(1000 * settings.connection_idle_seconds)),
    ]
    if settings.connection_age_seconds:
        limits += [
            ("grpc.max_connection_age_ms", round(1000 * settings.connection_age_seconds)),
            ("grpc.max_connection_age_grace_ms", round(1000 * settings.connection_grace_seconds)),
        ]
    return limits


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


def refuse_taken(host: str, port: int) -> None:
    """Refuses an address that can't be had, before gRPC would log it past every logger.

    gRPC listens on those of a host's addresses that it gets: a machine may lack IPv6. But where one of
    ``localhost`` is taken, some clients would reach another program there.

    Raises:
        RefusedError: no address of the host can be listened on, or one is taken.
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
            reason = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                raise RefusedError(_cannot(str(address[0]), port, reason)) from error
            reasons.append(reason)
    if len(reasons) == len(addresses):
        raise RefusedError(_cannot(host, port, " and ".join(dict.fromkeys(reasons))))


def _cannot(host: str, port: int, reason: str) -> str:
    return (
        f"gRPC can't listen on {host}:{port} ({reason}); choose another address with --host and --port "
        "(0 for any port that is free), or end what uses this one"
    )
