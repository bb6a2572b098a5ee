"""How long an engine has been at the same thing, by repeated looks at its pulse.

Time counts only while the server process itself runs: after a pause of both (a stopped process group, a
suspended machine) or where the event loop is held up, a look counts as little more than the usual interval,
so that the engine gets its time before it is taken for hung.
"""

from __future__ import annotations

from server.engine.ipc.pulse import Pulse, Reading

LOOK_SECONDS = 0.5
"""Between two looks."""

# A look that comes late counts as so many intervals at most.
_MOST_INTERVALS = 2
# Compiling a kernel may take so many times as long as a step.
_COMPILING = 5


class Watch:
    """Watches one engine.

    Args:
        pulse: of the engine.
        limit: seconds that it may be at the same step or leave messages unread; 0 for any number.

    Attributes:
        age: for how long it has been at the same step, or has left a message unread, in seconds as of the
            last look; 0 where there is nothing to do.
    """

    def __init__(self, pulse: Pulse, limit: float) -> None:
        self._pulse = pulse
        self._limit = limit
        self._before: Reading | None = None
        self._looked = 0.0
        self.age = 0.0

    def look(self, now: float, sent: int) -> str | None:
        """Looks once; to be called every ``LOOK_SECONDS``.

        Args:
            now: monotonic seconds.
            sent: messages sent to the engine since it was ready.

        Returns:
            In what the engine hangs, as the rest of a sentence about it; ``None`` while it does not.
        """
        reading = self._pulse.read()
        busy = reading.began != 0 or reading.handled < sent
        if busy and reading == self._before:
            self.age += min(now - self._looked, _MOST_INTERVALS * LOOK_SECONDS)
        else:
            self.age = 0.0
        self._before, self._looked = reading, now
        limit = self._limit * (_COMPILING if reading.compiling else 1)
        if not self._limit or self.age < limit:
            return None
        if reading.compiling:
            return f"has been compiling a kernel for {self.age:.1f} s"
        if reading.began:
            return f"has been in one step for {self.age:.1f} s"
        return f"has not read its messages for {self.age:.1f} s"
