"""``/metrics`` and the probes of health over HTTP, on an address of their own.

Probes by HTTP are answered where those by gRPC can't connect, since other clients hold all its connections.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import h11
from prometheus_client import CollectorRegistry, make_asgi_app

from server.errors import RefusedError
from server.observe import http_server
from server.observe.http_server import TEXT, Answer, Headers, HttpServer, has_body

Authorize = Callable[[str], bool | None]
"""Whether an ``Authorization`` header shows an identity that may read; ``None`` if it shows none."""

Ready = Callable[[], Awaitable[bool]]
"""Asks the event loop of gRPC whether requests are answered; called in another event loop."""

# A probe that is in more of a hurry says so by its own timeout: Kubernetes' is a second.
_LOOP_SECONDS = 5.0


class _Pages:
    """The answers to HTTP requests.

    Args:
        registry: what ``/metrics`` shows.
        ready: for ``/healthz`` and ``/readyz``.
        authorize: who may read ``/metrics``; without it all may.
    """

    def __init__(self, registry: CollectorRegistry, ready: Ready, authorize: Authorize | None) -> None:
        self._application = make_asgi_app(registry)
        self._ready = ready
        self._authorize = authorize

    async def respond(self, request: h11.Request) -> Answer:
        """The answer to a request."""
        path, _, query = request.target.partition(b"?")
        headers = [(bytes(name), bytes(value)) for name, value in request.headers]
        probes = path in (b"/healthz", b"/readyz")  # of those who have no token, as gRPC's health
        if not probes and (refusal := self._refusal(headers)) is not None:
            return refusal
        if request.method not in (b"GET", b"HEAD"):
            return Answer(405, [*TEXT, (b"allow", b"GET, HEAD")], b"only GET and HEAD are answered here\n")
        if not probes and path != b"/metrics":
            return Answer(404, TEXT, b"only /metrics, /healthz and /readyz are here\n")
        if has_body(request):
            return Answer(413, TEXT, b"a request has no body here\n")
        if probes:
            return await self._health(must_be_ready=path == b"/readyz")
        try:
            return await _from(self._application, headers, query)
        except Exception:
            # prometheus_client 0.26 fails to read some Accept headers; without any it gives plain text.
            return await _from(self._application, (), query)

    def _refusal(self, headers: Headers) -> Answer | None:
        if self._authorize is None:
            return None
        shown = b",".join(value for name, value in headers if name == b"authorization")
        allowed = self._authorize(shown.decode("latin-1"))
        if allowed is None:
            realm = (b"www-authenticate", b'Basic realm="longspan"')
            return Answer(401, [*TEXT, realm], b"/metrics needs the token of an identity\n")
        if not allowed:
            return Answer(403, TEXT, b"the token's identity lacks metrics = true\n")
        return None

    async def _health(self, *, must_be_ready: bool) -> Answer:
        try:
            async with asyncio.timeout(_LOOP_SECONDS):
                ready = await self._ready()
        except (TimeoutError, RuntimeError):  # it is busy; it has ended
            return Answer(
                503, TEXT, f"gRPC's event loop did not answer within {_LOOP_SECONDS:g} s\n".encode()
            )
        if must_be_ready and not ready:
            return Answer(503, TEXT, b"not ready\n")
        return Answer(200, TEXT, b"ready\n" if ready else b"alive, not ready\n")


def listen(
    registry: CollectorRegistry,
    host: str,
    port: int,
    ready: Ready,
    *,
    authorize: Authorize | None = None,
    tls: Callable[[], ssl.SSLContext] | None = None,
) -> tuple[HttpServer, int]:
    """Serves ``/metrics``, ``/healthz`` and ``/readyz`` from a thread; port 0 takes a free one.

    Args:
        registry: what ``/metrics`` shows.
        host: address to listen on.
        port: its port.
        ready: whether requests are answered. ``/healthz`` asks only that it returns.
        authorize: who may read ``/metrics``; without it all may.
        tls: gives the context of each new connection.

    Returns:
        The HTTP server, to be closed, and its port.

    Raises:
        RefusedError: the address can't be had.
    """
    try:
        return http_server.listen(host, port, _Pages(registry, ready, authorize).respond, tls)
    except OSError as error:
        raise RefusedError(
            f"metrics can't listen on {host}:{port} ({error.strerror or error}); "
            "choose another address with --metrics-host and --metrics-port, or end what uses this one"
        ) from error


async def _from(
    application: Callable[..., Awaitable[None]], headers: Iterable[tuple[bytes, bytes]], query: bytes
) -> Answer:
    """An ASGI application's answer to a GET."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(part: dict[str, Any]) -> None:
        sent.append(part)

    await application({"type": "http", "headers": headers, "query_string": query}, receive, send)
    begin, rest = sent
    return Answer(begin["status"], begin["headers"], rest["body"])
