"""``/readyz`` over HTTP, with the standard library alone: the image asks it every ten seconds."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from typing import NamedTuple


class NoAnswerError(Exception):
    """Nothing that speaks HTTP answered; the reason, and what to look at."""


class _Named(http.client.HTTPSConnection):
    """A connection by TLS to a server whose certificate may have another name than its address."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, name: str, timeout: float) -> None:
        super().__init__(host, port, context=context, timeout=timeout)
        self._tls, self._name = context, name

    def connect(self) -> None:
        """Connects."""
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name)


class Names(NamedTuple):
    """What a certificate is checked with.

    Attributes:
        roots: PEM file of those that it must come from; ``None`` for this machine's own.
        name: that it must have; ``None`` for the address.
    """

    roots: str | Path | None
    name: str | None


def readiness(host: str, port: int, seconds: float, tls: Names | None = None) -> int:
    """Asks once, on a connection of its own.

    Args:
        host: where ``/metrics`` is.
        port: its port.
        seconds: that connecting, and the answer, may each take.
        tls: for HTTPS; plain HTTP without it.

    Returns:
        The status: 200 where requests are answered.

    Raises:
        NoAnswerError: it can't be reached, shows another certificate, is too slow, or speaks no HTTP.
    """
    if tls is None:
        connection = http.client.HTTPConnection(host, port, timeout=seconds)
    else:
        try:
            context = ssl.create_default_context(cafile=tls.roots)
        except OSError as error:
            raise NoAnswerError(f"{tls.roots} has no roots that can be read ({_reason(error)})") from error
        connection = _Named(host, port, context, tls.name or host, seconds)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswerError(
            f"no answer from {host}:{port} ({_reason(error)}); is the server there, with --metrics, "
            "and with --metrics-tls exactly where this command has it?"
        ) from error
    finally:
        connection.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
