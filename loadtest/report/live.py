"""The report of a comparison while it runs, on a port of this machine that no other can reach.

One page and one address for its updates: a request for ``next`` waits until there is a newer page than the
one that it names. Other web pages can't read it: requests whose ``Host`` is not this server's are refused, so
that no foreign name that resolves to this address opens it, and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loadtest.compare.types import Comparison, Judgment
from loadtest.report.compare import Progress, render, render_progress

HOST = "127.0.0.1"

_WAIT = 20.0  # seconds after which a request is answered without an update, to notice dead connections
_LINGER = 2.0  # seconds that a page has to come back for the last version
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Live:
    """Serves the newest page until it is closed.

    A page is made while one is open, within ``update``, so that it takes no time from a cell that is
    being measured; else when it is asked for.

    Args:
        port: to listen on; 0 for one that is free.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int = 0) -> None:
        self._newer = threading.Condition()
        # The page itself last changed with version ``_changed``; later versions changed only progress.
        self._version, self._changed = 0, 0
        self._state: tuple[Comparison, Judgment] | None = None
        self._progress: Progress | None = None
        self._html = ""
        self._ended = self.closing = False
        self._asked, self._sent = -math.inf, -1
        live = self

        class Handler(_Handler):
            page = live

        self._server = _Server((HOST, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="report", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """The address to open."""
        return f"http://{HOST}:{self._server.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Values of the ``Host`` header that mean this server."""
        port = self._server.server_port
        return (f"{HOST}:{port}", f"localhost:{port}")

    def update(self, comparison: Comparison, judgment: Judgment, progress: Progress) -> None:
        """Shows what there is so far; rows that are added to the comparison later don't matter."""
        self._publish(_kept(comparison), judgment, progress)

    def progress(self, progress: Progress) -> None:
        """Shows how far the run is, which is cheap; the rest of the page stays."""
        with self._newer:
            self._progress, self._version = progress, self._version + 1
            self._newer.notify_all()

    def end(self, comparison: Comparison, judgment: Judgment) -> None:
        """Shows the whole comparison; open pages get it before the server closes."""
        self._publish(comparison, judgment, None)
        self.close()

    def close(self) -> None:
        """Ends the server. Pages that are open keep what they show."""
        with self._newer:
            if self.closing:
                return
            self.closing = True
            self._newer.notify_all()
            until = time.monotonic() + _LINGER
            while self._ended and self._watched and self._sent < self._version and time.monotonic() < until:
                self._newer.wait(until - time.monotonic())
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def page(self) -> str:
        """The newest page."""
        with self._newer:
            self._asked = time.monotonic()
            return self._made()

    def after(self, version: int) -> dict[str, Any]:
        """The update since a version, as soon as there is one.

        Returns:
            ``version``, ``ended`` and, if they are newer, ``html`` of the page or only of its ``progress``.
        """
        with self._newer:
            self._asked = time.monotonic()
            self._newer.wait_for(lambda: self._version > version or self.closing, _WAIT)
            update: dict[str, Any] = {"version": self._version, "ended": self._ended}
            if self._changed > version:
                update["html"] = self._made()
            elif self._version > version and self._progress is not None:
                update["progress"] = render_progress(self._progress)
            return update

    def sent(self, version: int) -> None:
        """A page has got this version."""
        with self._newer:
            self._sent = max(self._sent, version)
            self._asked = time.monotonic()
            self._newer.notify_all()

    @property
    def _watched(self) -> bool:
        """A page is open, as far as can be known: one that is asks again when it has been answered."""
        return time.monotonic() - self._asked < _WAIT + _LINGER

    def _publish(self, comparison: Comparison, judgment: Judgment, progress: Progress | None) -> None:
        with self._newer:
            self._state, self._progress, self._html = (comparison, judgment), progress, ""
            self._version += 1
            self._changed, self._ended = self._version, progress is None
            if self._watched:
                self._made()
            self._newer.notify_all()

    def _made(self) -> str:
        if not self._html and self._state is not None:
            self._html = render(*self._state, live=True, progress=self._progress)
        return self._html or _STARTING


def _kept(comparison: Comparison) -> Comparison:
    """The comparison as it is now: rows are added later, and replaced where they are set aside."""
    rows = {name: list(getattr(comparison, name)) for name in ("speed", "answers", "text", "memory")}
    facts = {name: dict(getattr(comparison, name)) for name in ("model", "running", "failed")}
    changes: dict[str, Any] = {**rows, **facts}
    return replace(comparison, **changes)


class _Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        """Without the base class's look-up of this machine's name, which can take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    page: Live
    protocol_version = "HTTP/1.1"
    server_version = "longspan"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        if self.headers.get("Host", "").lower() not in self.page.hosts:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", f"Open {self.page.address} instead.\n")
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._answer(HTTPStatus.OK, "text/html", self.page.page())
        elif address.path == "/next":
            try:
                version = int(parse_qs(address.query)["after"][0])
            except (KeyError, ValueError):
                self._answer(HTTPStatus.BAD_REQUEST, "text/plain", "Ask for next?after=VERSION.\n")
                return
            update = self.page.after(version)
            self._answer(HTTPStatus.OK, "application/json", json.dumps(update))
            self.page.sent(update["version"])
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is one page only: /\n")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Also for unsupported methods."""
        del message, explain
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code = HTTPStatus.METHOD_NOT_ALLOWED
        self.close_connection = True
        self._answer(HTTPStatus(code), "text/plain", f"{HTTPStatus(code).phrase}; only GET is served.\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: the terminal shows the comparison."""

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            if status == HTTPStatus.METHOD_NOT_ALLOWED:
                self.send_header("Allow", "GET")
            if self.page.closing:
                self.send_header("Connection", "close")
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the page was closed meanwhile


_STARTING = (
    "<!doctype html><meta charset='utf-8'><meta http-equiv='refresh' content='1'>"
    "<title>Longspan</title><p>The comparison is about to begin.</p>"
)
