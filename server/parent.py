"""The end of a process with the one that started it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal

log = logging.getLogger("longspan.server")

_SET_PARENT_DEATH_SIGNAL = 1


def end_with_parent(parent: int) -> None:
    """Has Linux kill this process once the thread that started it ends, as it does when its process dies.

    It takes effect within native code, too, and in a process that is stopped.

    Args:
        parent: id of the process that started this one, which ends at once where that one has died already.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0):
        why = os.strerror(ctypes.get_errno())
        log.warning("process %d may outlive the one that started it: prctl fails (%s)", os.getpid(), why)
    if os.getppid() != parent:
        os._exit(1)
