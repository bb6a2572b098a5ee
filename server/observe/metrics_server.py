"""``/metrics`` over HTTP, on an address of its own, if asked for by TLS and for those who show a token."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from server.errors import RefusedError

log = logging.getLogger("longspan.server")

Authorize = Callable[[str], bool]

# A connection that sends nothing must not keep its thread.
_IDLE_SECONDS = 30.0


class _Handler(WSGIRequestHandler):
    timeout = _IDLE_SECONDS

    def log_message(self, format: str, *arguments: object) -> None:
        """Logs nothing: a scrape every few seconds is no news."""


class _Server(ThreadingWSGIServer):
    """Attributes:
    tls: what gives the context of a new connection; ``None`` for plain text.
    """

    tls: Callable[[], ssl.SSLContext] | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        """A new connection; its handshake is left to its own thread, which a slow client may hold up.

        Raises:
            OSError: there is none; any other exception would end the thread that accepts connections.
        """
        connection, address = super().get_request()
        if self.tls is None:
            return connection, address
        try:
            context = self.tls()
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address
        except Exception as error:
            log.exception("a connection to the metrics was refused")
            connection.close()
            raise OSError("the connection can't be had by TLS") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a connection that breaks, or whose client speaks no TLS."""


def listen(
    registry: CollectorRegistry,
    host: str,
    port: int,
    *,
    authorize: Authorize | None = None,
    tls: Callable[[], ssl.SSLContext] | None = None,
) -> tuple[WSGIServer, int]:
    """Serves ``/metrics`` from a thread; port 0 takes a free one.

    Args:
        registry: what it shows.
        host: address to listen on.
        port: its port.
        authorize: whether a request with this ``Authorization`` header may read; without it all may.
        tls: gives the context of each new connection.

    Returns:
        The HTTP server, to be shut down, and its port.

    Raises:
        RefusedError: the address can't be had.
    """
    application = _for_any_client(make_wsgi_app(registry))
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        kind = type(
            "_Server", (_Server,), {"address_family": family, "tls": staticmethod(tls) if tls else None}
        )
        server: WSGIServer = kind((address[0], port), _Handler)
    except OSError as error:
        raise RefusedError(
            f"metrics can't listen on {host}:{port} ({error.strerror or error}); "
            "choose another address with --metrics-host and --metrics-port, or end what uses this one"
        ) from error
    server.set_app(application if authorize is None else _authorized(application, authorize))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, server.server_port


def _for_any_client(application: WSGIApplication) -> WSGIApplication:
    """The same, with plain text for a client whose Accept header prometheus_client (0.26) fails to read."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return application(environ, start_response)
        except Exception:
            if environ.pop("HTTP_ACCEPT", None) is None:
                raise
            return application(environ, start_response)

    return answer


def _authorized(application: WSGIApplication, authorize: Authorize) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if authorize(environ.get("HTTP_AUTHORIZATION", "")):
            return application(environ, start_response)
        headers = [("WWW-Authenticate", 'Basic realm="longspan"'), ("Content-Type", "text/plain")]
        start_response("401 Unauthorized", headers)
        return [b"/metrics needs the token of an identity with metrics = true\n"]

    return answer
