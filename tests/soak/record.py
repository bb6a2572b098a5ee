"""What a run has seen, window by window."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Memory(NamedTuple):
    """Resident bytes of a process at a time."""

    when: float
    process: int
    bytes: int


@dataclass
class Window:
    """Some seconds with one fault, or none.

    Attributes:
        fault: its name.
        begun: monotonic time.
        real: calls of real clients that ended in it, by kind and status.
        tokens: that real streams and answers brought.
        compared: answers, whole or in part, that were compared with the unloaded server's.
        gaps: seconds between deltas of real streams.
        health: seconds that health took to answer.
        unanswered: looks at health that nothing answered.
        hostile: inputs by status.
        found: the fault's own figures.
        wrong: sentences about what should not have been.
    """

    fault: str
    begun: float = field(default_factory=time.monotonic)
    real: Counter[tuple[str, str]] = field(default_factory=Counter)
    tokens: int = 0
    compared: int = 0
    gaps: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    unanswered: int = 0
    hostile: Counter[str] = field(default_factory=Counter)
    found: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Calls of real clients that ended well."""
        return sum(count for (_, status), count in self.real.items() if status == "OK")


class Record:
    """The windows of a run; what is seen counts for the last one.

    Attributes:
        windows: all so far.
        sent: generation calls that clients, real and hostile, have begun.
        kinds: hostile inputs by kind.
        fields: hostile fields that were sent.
        strangers: calls without a known token, by status.
        server: memory of the server process.
        engine: of the engines.
        encoders: of the servers and engines of encoders, by name.
        full: when each page of an engine's KV cache had been written, by process.
    """

    def __init__(self) -> None:
        self.windows = [Window("start")]
        self.sent = 0
        self.kinds: Counter[str] = Counter()
        self.fields: set[str] = set()
        self.strangers: Counter[str] = Counter()
        self.server: list[Memory] = []
        self.engine: list[Memory] = []
        self.encoders: dict[str, list[Memory]] = {}
        self.full: dict[int, float] = {}

    @property
    def now(self) -> Window:
        """The window of this moment."""
        return self.windows[-1]

    def begin(self, fault: str) -> Window:
        """Begins the next window."""
        self.windows.append(Window(fault))
        return self.now
