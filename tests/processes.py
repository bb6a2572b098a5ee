"""Processes that another process started."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil


def wait_ended(process: psutil.Process, seconds: float) -> None:
    """Waits until a process has ended, whether or not its new parent has noticed; fails if it does not."""
    end = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, f"{process} still runs"
            time.sleep(0.01)


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits until something holds, and fails if that does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
