"""The end of a process with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

_SET_PARENT_DEATH_SIGNAL = 1


def end_with_parent(parent: int) -> None:
    """Has Linux kill this process once the thread that started it ends, as it does when its process dies.

    It takes effect within native code, too, and in a process that is stopped.

    Args:
        parent: id of the process that started this one, which ends at once where that one has died already.
    """
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
