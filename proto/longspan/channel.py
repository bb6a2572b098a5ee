"""How a client reaches a server: address, TLS, what it shows of itself, and which calls are repeated."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from longspan.affinity import By
from longspan.credentials import credentials

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051

SERVICE = "longspan.v1.InferenceService"
"""The name under which the server reports its readiness to gRPC's health check."""

ENCODERS = "longspan.v1.EncoderService"
"""The service of encoders, reported ready with the other."""

Metadata = tuple[tuple[str, str | bytes], ...]

_OPTIONS: tuple[tuple[str, Any], ...] = (
    # A long prompt's log probabilities are many times gRPC's default limit of 4 MiB.
    ("grpc.max_receive_message_length", 256 << 20),
    # No message comes during a long prefill: pings find a peer that has vanished. The server permits them.
    # gRPC 1.82 heeds no timeout of keepalive, and waits 60 s for a ping's answer if not told.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 30_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC would wait up to 2 minutes between attempts to connect; a server starts in less.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# gRPC repeats a call only until the server has answered anything, so that no answer begins twice.
_RETRIES = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
# A prompt that is larger than this is not kept, and so not sent again; gRPC keeps 256 KiB if not told.
_KEPT_BYTES = 8 << 20

_NAMED = re.compile(r"(dns|unix|unix-abstract|vsock|ipv4|ipv6|xds):")
_WITH_PORT = re.compile(r":\d+$")

# The values that gRPC can send as metadata; names that end in -bin may have any bytes as value.
_NAME = re.compile(r"[a-z0-9._-]+")
_VALUE = re.compile(r"[ -~]*")


class ConnectOptions(TypedDict, total=False):
    """The options of a client's connection.

    Attributes:
        tls: connect by TLS. Any of the next four implies it.
        ca: PEM file of the roots that the server's certificate must come from; without it those that gRPC
            brings (Mozilla's).
        cert: PEM file of the client's own certificate, for mutual TLS.
        key: PEM file of its private key.
        server_name: name that the server's certificate must have, where that is not the address.
        token: shown with every call. Refused for a connection to another machine without TLS.
        metadata: pairs of names and values that are sent with every call; ``authorization`` among them is
            refused as a token is.
        retries: repeat a call that the server could not begin (UNAVAILABLE), three times within about a
            second; on unless ``False``.
        affinity: what a balancer before several servers may keep together, see ``longspan.affinity``:
            ``"prompt"``, generations whose prompts begin alike; ``"session"``, those of this client.
    """

    tls: bool
    ca: str | Path
    cert: str | Path
    key: str | Path
    server_name: str
    token: str
    metadata: Sequence[tuple[str, str | bytes]]
    retries: bool
    affinity: By


def target(host: str, port: int) -> str:
    """``host:port`` in gRPC's form, an IPv6 address in brackets.

    A host in one of gRPC's own forms, like ``dns:///name``, ``dns:///name:port`` or ``unix:/path``, is kept;
    a name without a port gets this one. The addresses of a ``dns:`` name are called in turn.

    Raises:
        ValueError: the host has a port of its own, or is no address.
    """
    if named := _NAMED.match(host):
        return f"{host}:{port}" if named[1] == "dns" and not _WITH_PORT.search(host) else host
    if ":" not in host:
        return f"{host}:{port}"
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        scheme, _, bare = host.rpartition("://")
        name, _, rest = bare.rstrip("/").rpartition(":")
        if rest.isdigit():
            instead = f"give them apart: host {name} and port {rest}"
        else:
            instead = f"give the name alone: host {rest}" if scheme and rest else "give a name or an address"
        raise ValueError(f"{host!r} is not the address of a host; {instead} (--host, --port)") from None
    return f"[{host}]:{port}"


def open_channel(api: Any, address: str, options: ConnectOptions) -> Any:
    """A channel to the server at ``address``, a ``target``.

    Args:
        api: ``grpc`` or ``grpc.aio``.
        address: of the server.
        options: what the client was told.

    Raises:
        ValueError: options contradict one another, or a file is not what it must be; the sentence says which.
    """
    local = _stays_here(address)
    arguments = (*_OPTIONS, *_service_config(address, options.get("retries", True)))
    if local:
        # A proxy of the environment would be sent the token, and can't reach this machine's own servers.
        arguments += (("grpc.enable_http_proxy", 0),)
    if server_name := options.get("server_name"):
        arguments += (("grpc.ssl_target_name_override", server_name),)
    if not any(options.get(name) for name in ("tls", "ca", "cert", "key", "server_name")):
        if not local and any(name.lower() == "authorization" for name, _ in headers(options)):
            raise ValueError(
                f"the token could be read on the way to {address}: connect by TLS (tls=True, --tls), or "
                "give a channel of your own"
            )
        return api.insecure_channel(address, options=arguments)
    given = credentials(options.get("ca"), options.get("cert"), options.get("key"))
    return api.secure_channel(address, given, options=arguments)


def headers(options: ConnectOptions) -> Metadata:
    """The metadata of every call.

    Raises:
        ValueError: gRPC could not send it; the sentence says what is wrong, without the token.
    """
    metadata = tuple(options.get("metadata", ()))
    for name, value in metadata:
        if not _NAME.fullmatch(name):
            raise ValueError(f"metadata {name!r}: a name has lower-case letters, digits and . _ - only")
        text = value if isinstance(value, str) else value.decode("latin-1")
        if not name.endswith("-bin") and not _VALUE.fullmatch(text):
            raise ValueError(
                f"metadata {name!r}: a value has printable ASCII characters only, or a name that ends in -bin"
            )
    if not (token := options.get("token")):
        return metadata
    token = token.strip()  # a file or a variable often ends it with a newline
    if not token or not _VALUE.fullmatch(token):
        raise ValueError(
            "the token is not one: these have printable ASCII characters only; give it as longspan token "
            "printed it (token, --token, LONGSPAN_TOKEN)"
        )
    return (("authorization", f"Bearer {token}"), *metadata)


def connect(api: Any, address: str, channel: Any, options: ConnectOptions) -> Any:
    """The channel given, or a new one.

    Raises:
        TypeError: an option has a name that there is not.
        ValueError: as of ``open_channel``; or options are given beside a channel, which has its own.
    """
    known = ConnectOptions.__annotations__
    if unknown := sorted(options.keys() - known):
        names = ", ".join(("timeout", "channel", *known))
        raise TypeError(f"there is no option {', '.join(unknown)}; the options are {names}")
    if channel is None:
        return open_channel(api, address, options)
    if beside := sorted(options.keys() - {"token", "metadata", "affinity"}):
        raise ValueError(f"a channel of your own has its own {', '.join(beside)}: leave these out")
    return channel


def _service_config(address: str, retries: bool) -> tuple[tuple[str, Any], ...]:
    config: dict[str, Any] = {}
    if address.startswith("dns:"):
        config["loadBalancingConfig"] = [{"round_robin": {}}]
    if retries:
        names = [{"service": service} for service in (SERVICE, ENCODERS)]
        config["methodConfig"] = [{"name": names, "retryPolicy": _RETRIES}]
    kept = (("grpc.per_rpc_retry_buffer_size", _KEPT_BYTES),) if retries else (("grpc.enable_retries", 0),)
    return (*kept, ("grpc.service_config", json.dumps(config)))


def _stays_here(address: str) -> bool:
    """Whether what is sent to this address stays on this machine."""
    named = _NAMED.match(address)
    scheme = named[1] if named else ""
    if scheme in ("unix", "unix-abstract"):
        return True
    if scheme in ("vsock", "xds"):
        return False  # another virtual machine; and whatever a control plane names
    host = _WITH_PORT.sub("", address[named.end() :] if named else address)
    if scheme == "dns":
        host = host.removeprefix("///")  # a name server of its own, dns://HOST/, says what the name is
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
