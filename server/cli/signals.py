"""The effect of signals on a command.

Python turns Ctrl-C into an exception, which during imports would print their traceback. So a command begins
as after ``interrupts_end``; a command that has to clean up or to report then asks for the exception, by
``interrupts_raise`` or ``signals_raise``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal, as shells have it."""


def interrupts_end(before: Callable[[], object] = lambda: None) -> None:
    """From now on Ctrl-C ends the process at once, without a message and with exit code ``INTERRUPTED``.

    Like the other functions here it does nothing outside of the main thread, the only one that gets signals.

    Args:
        before: called first.
    """

    def end(*_: object) -> None:
        before()
        os._exit(INTERRUPTED)

    _handle(signal.SIGINT, end)


def signals_end(before: Callable[[], object]) -> None:
    """As ``interrupts_end``, and SIGTERM and SIGHUP end the process with exit code 0.

    The first process of a container ignores these without a handler.

    Args:
        before: called first.
    """

    def end(*_: object) -> None:
        before()
        os._exit(0)

    interrupts_end(before)
    _handle(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        _handle(signal.SIGHUP, end)


def leave(code: int) -> NoReturn:
    """Ends the process at once, after what it has written: nothing that it runs at its exit is run.

    The interpreter's own end unwinds threads that come back from native code, such as one that still loads,
    and C++ that catches everything then aborts the process ("FATAL: exception not rethrown").
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # no reader is left, or it is closed
            stream.flush()
    os._exit(code)


def interrupts_raise() -> None:
    """From now on Ctrl-C raises ``KeyboardInterrupt``."""
    _handle(signal.SIGINT, signal.default_int_handler)


def signals_raise() -> None:
    """From now on Ctrl-C, SIGTERM, and SIGHUP of a terminal that closes raise ``KeyboardInterrupt``.

    So the command's processes end with it, and measurements are kept.
    """
    interrupts_raise()
    _handle(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        _handle(signal.SIGHUP, signal.default_int_handler)


def _handle(number: signal.Signals, handler: Callable[..., object]) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
