"""Settings of who reaches the server, how, and what they may do: addresses, connections, access."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings

from server.setting_types import File, Protocols


class NetworkSettings(BaseSettings):
    """Those after the model's."""

    host: str = Field("127.0.0.1", description="Address of the gRPC service.")
    port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC service; 0 picks a free one.")
    max_connections: int = Field(
        4096,
        ge=1,
        description="Connections to the gRPC service, at most; more are closed at once. Fewer where the "
        "process may not open so many files.",
    )
    max_streams_per_connection: int = Field(
        1024,
        ge=1,
        le=2**31 - 1,
        description="Calls at once on a connection, at most; clients hold back further ones.",
    )
    connection_idle_seconds: float = Field(
        300.0,
        ge=0.1,
        le=1e6,
        description="How long a connection without a call is kept; clients connect again when they call.",
    )
    connection_age_seconds: float = Field(
        3600.0,
        ge=0,
        le=1e6,
        description="Age at which a connection takes no more calls, so that clients come by a new one, and "
        "balancers can balance; a tenth more or less. 0: none.",
    )
    connection_grace_seconds: float = Field(
        3600.0,
        ge=0,
        le=1e6,
        description="How long calls may go on after that; then they end with UNAVAILABLE.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address of /metrics, /healthz and /readyz.")
    metrics_port: int = Field(9464, ge=0, le=65535, description="Port of these; 0 picks a free one.")

    metrics: bool = Field(True, description="Serve /metrics, /healthz and /readyz.")
    metrics_tls: bool = Field(False, description="Serve these by TLS, too, with the same certificate.")
    metrics_auth: bool = Field(
        False,
        description="Show /metrics only for the token of an identity that may read it, as bearer token, or "
        "password of basic authentication with the identity as user.",
    )

    tls_certificate: File = Field(
        None,
        description="Serve gRPC by TLS: PEM file of the certificate and those between it and its root.",
    )
    tls_key: File = Field(None, description="PEM file of the certificate's private key.")
    tls_client_ca: File = Field(
        None,
        description="PEM file of root certificates: only clients that show a certificate from one of these "
        "are served (mutual TLS).",
    )
    identities: File = Field(
        None,
        description="TOML file of who may ask: hashes of tokens, names in certificates, limits; read again "
        "when it changes. longspan token writes it.",
    )
    prefix_sharing: Literal["identity", "all"] = Field(
        "identity",
        description="Whose prompts the prefix cache finds: those of the same identity, or of all. all lets "
        "one find out whether another's prompt began alike.",
    )
    protocols: Protocols = Field(
        "",
        description="Services on the gRPC port beside Longspan's own, with commas: vllm (for the SMG "
        "gateway), kserve (Open Inference Protocol v2), channelz (gRPC's state; tells addresses of clients).",
    )
    reflection: bool = Field(True, description="Describe the services to clients that ask (reflection).")
    server_info: bool = Field(True, description="Answer GetServerInfo: settings, versions and load.")
    abort: bool = Field(True, description="Let clients end their requests by name (Abort).")
    load_reports: bool = Field(
        False,
        description="Tell balancers the load: a report in the trailers of each request, and a stream of "
        "reports for those who ask (ORCA).",
    )
    kv_events: str | None = Field(
        None,
        description="Publish which prompts' pages are cached, tokens included, for routers like llm-d's: an "
        "address of ZMQ's, like tcp://127.0.0.1:5557, which needs longspan[kv-events]; with --protocols vllm "
        "also as a stream of that service; grpc for the stream alone.",
    )
    kv_events_replay: str | None = Field(
        None, description="Address at which routers ask for events that they missed."
    )
    insecure: bool = Field(
        False,
        description="Let other machines reach the gRPC service without TLS, or without tokens or "
        "certificates of clients; for a network where something else protects it.",
    )

    @property
    def streams_kv_events(self) -> bool:
        """Whether events of the KV cache go out by gRPC."""
        return self.kv_events is not None and "vllm" in self.protocols.split(",")
