"""A small HTTP server in a thread of its own, with bounds on connections, sizes and times."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import h11

log = logging.getLogger("longspan.server")

MOST_CONNECTIONS = 64
"""A scraper needs one, a probe another. One more ends that which has waited longest for a request."""

# Prometheus keeps its connection, and scrapes once a minute or more often.
_IDLE_SECONDS = 90.0
# For a handshake, for a request from its first byte to its last, and for an answer to be taken.
_REQUEST_SECONDS = 10.0
_GOODBYE_SECONDS = 1.0
_MOST_HEADER_BYTES = 16 << 10
# One that can't be accepted stays in the queue, so that the next try comes after a pause.
_ACCEPT_PAUSE_SECONDS = 0.1

Headers = list[tuple[bytes, bytes]]
TEXT: Headers = [(b"content-type", b"text/plain; charset=utf-8")]


class Answer(NamedTuple):
    """An answer to a request; ``HEAD`` gets it without the body."""

    status: int
    headers: Headers
    body: bytes


Respond = Callable[[h11.Request], Awaitable[Answer]]
"""Answers a request, in the thread's event loop; it must not raise."""


class HttpServer:
    """Answers in a thread with an event loop of its own, also while gRPC's loop is busy.

    It holds ``MOST_CONNECTIONS`` connections at most, each for no longer than a bound.
    """

    def __init__(
        self,
        listener: socket.socket,
        respond: Respond,
        tls: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        self._listener = listener
        self._respond = respond
        self._tls = tls
        self._connections: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Task[None], None] = {}  # for a request; in the order in which they began
        self._loop = asyncio.new_event_loop()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all connections and leaves the address."""
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(asyncio.wait({self._accepting}))
            for connection in self._connections:
                connection.cancel()
            if self._connections:
                self._loop.run_until_complete(asyncio.wait(set(self._connections)))
        finally:
            self._listener.close()
            self._loop.close()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            if len(self._connections) >= MOST_CONNECTIONS:
                if not self._waiting:
                    connection.close()
                    continue
                oldest = next(iter(self._waiting))
                oldest.cancel()
                await asyncio.wait({oldest})
            task = self._loop.create_task(self._serve(connection))
            self._connections.add(task)
            self._waiting[task] = None
            task.add_done_callback(self._forget)
            # Those that have asked meanwhile wait no longer, and are not the ones to end.
            await asyncio.sleep(0)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        self._waiting.pop(task, None)

    async def _serve(self, connection: socket.socket) -> None:
        """A connection from its handshake to its end."""
        transport = None
        try:
            reader = asyncio.StreamReader()
            transport, protocol = await self._open(connection, reader)
            writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
            # So that drain waits for all of an answer.
            transport.set_write_buffer_limits(0)
            await self._converse(reader, writer)
            async with asyncio.timeout(_GOODBYE_SECONDS):
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass  # it broke, its client speaks no TLS, or it took too long: no news
        except Exception:
            log.exception("a connection to the metrics' address failed")
        finally:
            if transport is not None:
                transport.abort()

    async def _open(
        self, connection: socket.socket, reader: asyncio.StreamReader
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """A connection's transport, after the handshake if it has one."""
        try:
            context = None if self._tls is None else self._tls()
        except BaseException:
            connection.close()
            raise
        return await self._loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader),
            connection,
            ssl=context,
            ssl_handshake_timeout=None if context is None else _REQUEST_SECONDS,
            ssl_shutdown_timeout=None if context is None else _GOODBYE_SECONDS,
        )

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request after the other, until one side wants no more."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEADER_BYTES)
        while True:
            try:
                request = await self._next_request(http, reader)
                if request is None:
                    return
                answer = await self._respond(request)
            except h11.RemoteProtocolError as error:
                answer = Answer(error.error_status_hint, TEXT, f"{error}\n".encode())
                request = None
            async with asyncio.timeout(_REQUEST_SECONDS):
                writer.write(_bytes(http, answer, request))
                await writer.drain()
            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return
            http.start_next_cycle()

    async def _next_request(self, http: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
        """The next request, without its body if it has one; ``None`` at the end.

        Raises:
            h11.RemoteProtocolError: what came is no request, or is too long.
            TimeoutError: it did not come in time.
        """
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = None
        begun = False
        try:
            async with asyncio.timeout(_IDLE_SECONDS) as limit:
                while True:
                    event = http.next_event()
                    if isinstance(event, h11.Request):
                        if not has_body(event):
                            http.next_event()  # its end
                        return event
                    if event is not h11.NEED_DATA:
                        return None
                    http.receive_data(await reader.read(_MOST_HEADER_BYTES))
                    if not begun:
                        begun = True
                        limit.reschedule(self._loop.time() + _REQUEST_SECONDS)
        finally:
            self._waiting.pop(task, None)


def listen(
    host: str, port: int, respond: Respond, tls: Callable[[], ssl.SSLContext] | None = None
) -> tuple[HttpServer, int]:
    """Serves from a thread; port 0 takes a free one.

    Args:
        host: address to listen on.
        port: its port.
        respond: answers requests.
        tls: gives the context of each new connection.

    Returns:
        The server, to be closed, and its port.

    Raises:
        OSError: the address can't be had.
    """
    listener = None
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        if listener is not None:
            listener.close()
        raise
    listener.setblocking(False)
    bound = listener.getsockname()[1]
    return HttpServer(listener, respond, tls), bound


def has_body(request: h11.Request) -> bool:
    """Whether a request has a body, which is never read."""
    headers = dict(request.headers)
    return b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > 0


def _bytes(http: h11.Connection, answer: Answer, request: h11.Request | None) -> bytes:
    """An answer on the wire; one to what was not read as a whole request says that the connection ends."""
    headers = [*answer.headers, (b"content-length", str(len(answer.body)).encode())]
    if request is None or has_body(request):
        headers.append((b"connection", b"close"))
    events: list[h11.Event] = [h11.Response(status_code=answer.status, headers=headers)]
    if request is None or request.method != b"HEAD":
        events.append(h11.Data(data=answer.body))
    return b"".join(http.send(event) or b"" for event in (*events, h11.EndOfMessage()))
