"""Processes that another process started."""

from __future__ import annotations

import bisect
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def starved(*pids: int) -> float:
    """Seconds for which these processes' threads waited for a core that other work had, all together."""
    total = 0
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # the thread has ended
                total += int(file.read_text().split()[1])
    return total / 1e9


class Starving:
    """Takes from a time that was measured what these processes' threads waited for a core meanwhile.

    Other programs delay every answer; without that wait, a time is the processes' own.
    """

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._looks = [(time.monotonic(), starved(*pids))]

    def look(self) -> None:
        """To be called again and again: what is waited between two looks counts for all times between."""
        self._looks.append((time.monotonic(), starved(*self._pids)))

    def less(self, begun: float, ended: float) -> float:
        """Seconds from one monotonic time to another that no other program can have caused; at least 0."""
        index = bisect.bisect_right(self._looks, (begun, float("inf"))) - 1
        return max(0.0, ended - begun - (starved(*self._pids) - self._looks[max(0, index)][1]))


def wait_ended(process: psutil.Process, seconds: float) -> None:
    """Waits until a process has ended, whether or not its new parent has noticed; fails if it does not."""
    end = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, f"{process} still runs"
            time.sleep(0.01)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits until something holds, and fails if that does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
