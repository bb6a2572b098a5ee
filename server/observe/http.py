"""``/metrics`` over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry

from server.errors import RefusedError

_App = Callable[[dict[str, Any], Any], Iterable[bytes]]


def listen(registry: CollectorRegistry, host: str, port: int) -> tuple[WSGIServer, int]:
    """Serves ``/metrics`` from a thread; port 0 takes a free one.

    Returns:
        The HTTP server, to be shut down, and its port.

    Raises:
        RefusedError: the address can't be had.
    """
    try:
        server, _ = prometheus_client.start_http_server(port, host, registry)
    except OSError as error:
        raise RefusedError(
            f"metrics can't listen on {host}:{port} ({error.strerror or error}); "
            "choose another address with --metrics-host and --metrics-port, or end what uses this one"
        ) from error
    server.set_app(_for_any_client(prometheus_client.make_wsgi_app(registry)))
    return server, server.server_port


def _for_any_client(app: _App) -> _App:
    """The same, with plain text for a client whose Accept header prometheus_client (0.26) fails to read."""

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except Exception:
            if environ.pop("HTTP_ACCEPT", None) is None:
                raise
            return app(environ, start_response)

    return answer
