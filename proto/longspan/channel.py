"""The default address of a client, and the options of its channel."""

from __future__ import annotations

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051

SERVICE = "longspan.v1.InferenceService"
"""The name under which the server reports its readiness to gRPC's health check."""

OPTIONS: tuple[tuple[str, int], ...] = (
    # A long prompt's log probabilities are many times gRPC's default limit of 4 MiB.
    ("grpc.max_receive_message_length", 256 << 20),
    # No message comes during a long prefill: pings find a peer that has vanished. The server permits them.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC would wait up to 2 minutes between attempts to connect; a server starts in less.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def target(host: str, port: int) -> str:
    """``host:port`` in gRPC's form, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
