"""When an engine that failed is started again, and when no more."""

from __future__ import annotations

from collections import deque

_MOST_SECONDS = 60.0


class Restarts:
    """Counts failures within a window of the time that engines served.

    Time without an engine does not count, so that one that takes long to load and then fails is given up too.

    Args:
        most: failures within the window after which the engine is started again; with one more it is not.
        window: seconds of serving.
        backoff: seconds before the second start within the window; they double with each, up to a minute. The
            first comes at once.
    """

    def __init__(self, most: int, window: float, backoff: float) -> None:
        self._most = most
        self._window = window
        self._backoff = backoff
        self._failures: deque[float] = deque()

    def failed(self, served: float) -> float | None:
        """Notes a failure.

        Args:
            served: for how long engines have served so far, in seconds.

        Returns:
            How long to wait before the next start, in seconds; ``None`` if there is to be none.
        """
        self._failures.append(served)
        while self._failures[0] < served - self._window:
            self._failures.popleft()
        count = len(self._failures)
        if count > self._most:
            return None
        return 0.0 if count == 1 else min(self._backoff * 2 ** min(count - 2, 16), _MOST_SECONDS)

    @property
    def words(self) -> str:
        """How often it failed lately, as part of a sentence."""
        count = len(self._failures)
        return f"{count} {'times' if count > 1 else 'time'} within {self._window:g} s of serving"
