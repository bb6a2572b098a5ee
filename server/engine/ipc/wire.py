"""Messages as bytes between the server process and the engine process: a stream socket, each with its length.

Each also has its number, so that a lost one ends the link: a stream without some of its tokens, or one that
waits forever, would be worse. Both ends queue messages in memory while the other is slow to read: the server
process never waits for the engine, which may be in a long step, and the engine waits only some milliseconds.
Admission bounds the queues.
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections import deque
from collections.abc import Callable
from socket import socket
from typing import cast

log = logging.getLogger("longspan.link")

# In front of each message: its length and its number, most significant bytes first.
_LENGTH_BYTES = 4
_HEAD_BYTES = 8
_NUMBERS = 1 << 32
_READ_BYTES = 1 << 16
# Seconds that the engine waits for room for the rest of a message; a server process that reads makes room.
_ROOM_MS = 20
_LAST_WORDS_MS = 1000


class LostFrameError(Exception):
    """The link has lost, changed, repeated or reordered a message: nothing that it brings can be trusted."""


def frame(message: bytes, number: int) -> bytes:
    """The message as it goes over the wire, the ``number``-th of its direction from 0."""
    head = len(message).to_bytes(_LENGTH_BYTES, "big") + (number % _NUMBERS).to_bytes(4, "big")
    return head + message


class Frames:
    """Reassembles messages from the pieces that a stream delivers."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._due = 0

    def feed(self, data: bytes) -> list[bytearray]:
        """The messages that ``data`` completes, in order.

        Raises:
            LostFrameError: another message should have come.
        """
        pending = self._pending
        pending += data
        messages = []
        while len(pending) >= _HEAD_BYTES:
            number = int.from_bytes(pending[_LENGTH_BYTES:_HEAD_BYTES], "big")
            if number != self._due:
                raise LostFrameError(f"message {number} came where message {self._due} was due")
            end = _HEAD_BYTES + int.from_bytes(pending[:_LENGTH_BYTES], "big")
            if len(pending) < end:
                break
            self._due = (number + 1) % _NUMBERS
            messages.append(pending[_HEAD_BYTES:end])
            del pending[:end]
        return messages


class ServerEnd(asyncio.Protocol):
    """The server process's end, in its asyncio loop.

    Args:
        take: called with each message; raises ``LostFrameError`` for one that is none.

    Attributes:
        lost: set when the connection has ended and all messages before that were taken.
        broken: what is wrong with what came, a sentence, once something is.
    """

    def __init__(self, take: Callable[[bytearray], None]) -> None:
        self._take = take
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._sent = 0
        self.lost = asyncio.Event()
        self.broken: str | None = None

    async def connect(self, stream: socket) -> None:
        """Begins; the socket is closed at the end."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=stream)

    def send(self, message: bytes) -> None:
        """Sends a message, or drops it where the other end is closed."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message, self._sent))
            self._sent += 1

    def close(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the loop. A broken link is closed, and the engine ends with it."""
        try:
            for message in self._frames.feed(data):
                self._take(message)
        except LostFrameError as error:
            self.broken = f"the link to the engine is broken: {error}"
            log.error("%s", self.broken)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self.lost.set()


class EngineEnd:
    """The engine process's end, looked at between steps."""

    def __init__(self, stream: socket) -> None:
        stream.setblocking(False)
        self._stream = stream
        self._poller = select.poll()
        self._poller.register(stream)
        self._frames = Frames()
        self._received: deque[bytearray] = deque()
        self._ended = False
        self._unsent = bytearray()
        self._sent = 0

    @property
    def descriptor(self) -> int:
        """Of the stream; readable once part of a message has come, or the server process has ended."""
        return self._stream.fileno()

    def send(self, message: bytes) -> None:
        """Sends a message; later calls send the part for which the server process has left no room."""
        self._unsent += frame(message, self._sent)
        self._sent += 1
        self._send_on(_ROOM_MS)

    def poll(self, milliseconds: int | None) -> bool:
        """Waits until there is something to receive, at most so long; ``None`` waits without end.

        Raises:
            LostFrameError: the link is broken.
        """
        while not self._received and not self._ended:
            events = self._wait(
                select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN, milliseconds
            )
            if events & select.POLLOUT:
                self._send_on(0)
            if not events & ~select.POLLOUT:
                return False
            self._read()
        return True

    def receive(self) -> bytearray | None:
        """The next message, after ``poll`` said so; ``None`` if the server process has ended."""
        return self._received.popleft() if self._received else None

    def finish(self) -> None:
        """Waits briefly for unsent bytes to be sent."""
        self._send_on(_LAST_WORDS_MS)

    def _read(self) -> None:
        try:
            data = self._stream.recv(_READ_BYTES)
        except ConnectionError:  # it ended with unread messages
            data = b""
        self._received += self._frames.feed(data)
        self._ended = not data

    def _wait(self, events: int, milliseconds: int | None) -> int:
        self._poller.modify(self._stream, events)
        found = self._poller.poll(milliseconds)
        return found[0][1] if found else 0

    def _send_on(self, patience_ms: int) -> None:
        while self._unsent:
            try:
                del self._unsent[: self._stream.send(self._unsent)]
            except BlockingIOError:
                if not self._wait(select.POLLOUT, patience_ms):
                    return
            except ConnectionError:  # the server process has ended, as ``receive`` will tell
                self._unsent.clear()
