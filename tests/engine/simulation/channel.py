"""The link between the processes without a socket: torn, delayed and, on purpose, lost messages."""

from __future__ import annotations

import random
from collections import deque

from server.engine.ipc.wire import Frames, frame


class TickOverError(Exception):
    """The engine's message loop has done its step, or would wait."""


class Direction:
    """A stream of bytes in one direction. What was sent arrives in order, in pieces, some ticks later.

    Args:
        rng: draws the pieces and delays.
        longest: the longest delay in ticks.
    """

    def __init__(self, rng: random.Random, longest: int) -> None:
        self._rng = rng
        self.longest = longest
        self._flying: deque[tuple[int, bytes]] = deque()
        self._tick = self._sent = 0
        self.drop = False

    def send(self, message: bytes) -> None:
        """Sends a message, or loses it if ``drop`` is set, which is reset then."""
        data = frame(message, self._sent)
        self._sent += 1
        if self.drop:
            self.drop = False
            return
        cut = self._rng.randrange(len(data)) if self._rng.random() < 0.2 else 0
        for piece in (data[:cut], data[cut:]):
            if piece:
                earliest = self._flying[-1][0] if self._flying else self._tick
                due = self._tick + self._rng.randint(0, self.longest)
                self._flying.append((max(earliest, due), piece))

    def arrived(self) -> bytes:
        """The bytes that have arrived since the last call."""
        pieces = []
        while self._flying and self._flying[0][0] <= self._tick:
            pieces.append(self._flying.popleft()[1])
        return b"".join(pieces)

    def tick(self) -> None:
        """A tick has passed."""
        self._tick += 1


class ServerWire:
    """Stands in for ``ServerEnd``; what comes is read by the world."""

    def __init__(self, out: Direction) -> None:
        self._out = out

    def send(self, message: bytes) -> None:
        self._out.send(message)

    def close(self) -> None:
        """There is no socket."""


class EngineWire:
    """Stands in for ``EngineEnd``: ends the loop of ``Engine.run`` after each step."""

    def __init__(self, incoming: Direction, out: Direction) -> None:
        self._incoming, self._out = incoming, out
        self._frames = Frames()
        self._received: deque[bytearray] = deque()
        self._looked = self._stepped = False

    def send(self, message: bytes) -> None:
        self._out.send(message)

    def poll(self, milliseconds: int | None) -> bool:
        if not self._looked:
            self._looked = True
            self._received += self._frames.feed(self._incoming.arrived())
        if self._received:
            return True
        if self._stepped:
            raise TickOverError
        self._stepped = True  # by the loop, now that it is told that nothing has come
        return False

    def begin_tick(self) -> None:
        """The loop may receive, and do one step."""
        self._looked = self._stepped = False

    def receive(self) -> bytearray | None:
        return self._received.popleft()
