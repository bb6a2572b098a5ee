"""The engine process's progress, in memory that the server process reads too.

An engine that hangs can't send a message that says so. Its last values stay here, and ``watch.py`` sees that
they do not change.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import NamedTuple

# Of 8 bytes each, aligned: a processor writes and reads each as a whole.
_BEGAN, _HANDLED, _COMPILING = range(3)
_BYTES = 3 * 8


class Reading(NamedTuple):
    """The engine's progress when it was read.

    Attributes:
        began: monotonic nanoseconds at which it began with a step or a message; 0 while it has no work.
        handled: messages that it has dealt with since it was ready.
        compiling: whether a kernel is compiled within the step.
    """

    began: int
    handled: int
    compiling: bool


class Pulse:
    """The shared memory; the engine process writes, the server process reads.

    Args:
        descriptor: of the memory, which ``open_memory`` made here or in the process that started this one. It
            may be closed afterwards.
    """

    def __init__(self, descriptor: int) -> None:
        self._words = memoryview(mmap.mmap(descriptor, _BYTES)).cast("q")

    def begin(self) -> None:
        """A step begins, or the work on a message."""
        self._words[_BEGAN] = time.monotonic_ns()

    def rest(self) -> None:
        """There is no work left."""
        self._words[_BEGAN] = 0

    def handle(self) -> None:
        """One more message was dealt with."""
        self._words[_HANDLED] += 1

    def compile(self, under_way: bool) -> None:
        """A kernel begins to be compiled, or has been."""
        self._words[_COMPILING] = int(under_way)

    def read(self) -> Reading:
        """The engine's progress now."""
        began, handled, compiling = self._words
        return Reading(began, handled, bool(compiling))


def open_memory() -> int:
    """The descriptor of zeroed memory for a ``Pulse``, to be handed on and closed."""
    descriptor = os.memfd_create("longspan-pulse")
    os.ftruncate(descriptor, _BYTES)
    return descriptor
