"""The access that settings give, and refusals of settings that would let strangers in."""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from typing import NamedTuple

from server.access.callers import Callers
from server.access.certificates import Certificates
from server.access.watched import keep_looking
from server.errors import RefusedError
from server.settings import Settings

log = logging.getLogger("longspan.access")


class Access(NamedTuple):
    """The access that settings grant.

    Attributes:
        callers: the identities of gRPC calls.
        certificates: of the gRPC service; ``None`` where it is served without TLS.
        metrics_certificates: of ``/metrics``, likewise.
    """

    callers: Callers
    certificates: Certificates | None
    metrics_certificates: Certificates | None

    def begin(self) -> None:
        """Tells of certificates that are not valid now, and has changed files count within a second."""
        if self.certificates is not None:
            self.certificates.warn_of_dates()
            keep_looking(self.certificates.look)
        if self.callers.file is not None:
            keep_looking(self.callers.look)


def granted(settings: Settings) -> Access:
    """The access that settings give.

    Raises:
        RefusedError: they are incomplete; a file of theirs is not right; or other machines could use the
            server without TLS or without showing who they are, and ``insecure`` does not say so.
    """
    certificates = _certificates(settings)
    if settings.metrics_tls and certificates is None:
        raise RefusedError("--metrics-tls needs --tls-certificate and --tls-key, whose certificate it shows")
    if settings.metrics_auth and settings.identities is None:
        raise RefusedError("--metrics-auth needs --identities, whose tokens it asks for")
    callers = Callers(
        settings.identities,
        certificates=settings.tls_client_ca is not None,
        share_prefixes=settings.prefix_sharing == "all",
    )
    _refuse_exposed(settings)
    _refuse_exposed_events(settings)
    return Access(callers, certificates, certificates if settings.metrics_tls else None)


def warn_of_open_metrics(settings: Settings) -> None:
    """Says that other machines can read ``/metrics``, unless that is protected or wanted."""
    protected = settings.metrics_tls and settings.metrics_auth
    if not (protected or settings.insecure or only_this_machine(settings.metrics_host, "--metrics-host")):
        log.warning(
            "other machines can read /metrics on %s; --metrics-tls with --metrics-auth protects it, or a "
            "network policy",
            settings.metrics_host,
        )


def _certificates(settings: Settings) -> Certificates | None:
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is not None and key is not None:
        return Certificates(certificate, key, settings.tls_client_ca)
    for given, name, other in (
        (certificate, "--tls-certificate", "--tls-key"),
        (key, "--tls-key", "--tls-certificate"),
        (settings.tls_client_ca, "--tls-client-ca", "--tls-certificate and --tls-key"),
    ):
        if given is not None:
            raise RefusedError(f"{name} needs {other}: name both, or neither to serve without TLS")
    return None


def _refuse_exposed(settings: Settings) -> None:
    if settings.insecure or only_this_machine(settings.host):
        return
    lacking, remedies = [], []
    if settings.tls_certificate is None:
        lacking.append("TLS")
        remedies.append("--tls-certificate and --tls-key")
    if settings.identities is None and settings.tls_client_ca is None:
        lacking.append("showing who they are")
        remedies.append("--identities (or --tls-client-ca)")
    if lacking:
        raise RefusedError(
            f"--host {settings.host}: other machines could use this server without {' and '.join(lacking)}; "
            f"give {' and '.join(remedies)}, or listen on 127.0.0.1, or say --insecure where the network "
            "protects it"
        )


def _refuse_exposed_events(settings: Settings) -> None:
    if settings.kv_events_replay and not settings.kv_events:
        raise RefusedError("--kv-events-replay needs --kv-events, whose events it repeats")
    if settings.kv_events and not settings.prefix_cache:
        raise RefusedError(
            "--kv-events tells what is in the prefix cache, and --no-prefix-cache leaves it empty"
        )
    if settings.kv_events == "grpc":
        if not settings.streams_kv_events:
            raise RefusedError(
                "--kv-events grpc needs --protocols vllm, whose SubscribeKvEvents streams them"
            )
        if settings.kv_events_replay:
            raise RefusedError(
                "--kv-events-replay needs an address in --kv-events: by gRPC they are repeated anyway"
            )
        return
    given = {"--kv-events": settings.kv_events, "--kv-events-replay": settings.kv_events_replay}
    for flag, address in given.items():
        if address is None or address.startswith("ipc://"):
            continue
        form = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.%]+\]|[^:/\[\]]+):\d{1,5}", address)
        if form is None:
            other = ", or grpc" if flag == "--kv-events" else ""
            raise RefusedError(f"{flag} {address}: give tcp://HOST:PORT or ipc://PATH{other}")
        host = "0.0.0.0" if form[1] == "*" else form[1].strip("[]")
        if not settings.insecure and not only_this_machine(host, flag):
            raise RefusedError(
                f"{flag} {address}: other machines could read the tokens of all prompts, since nothing "
                "protects these events; give an address of this machine, or say --insecure where the network "
                "does"
            )


def only_this_machine(host: str, flag: str = "--host") -> bool:
    """Whether only this machine reaches an address, which this flag gives.

    Raises:
        RefusedError: the name stands for no address.
    """
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RefusedError(f"{flag} {host}: no address has this name ({error})") from error
    return all(is_loopback(str(address[0])) for *_, address in found)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a numeric address."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback
