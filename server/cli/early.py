"""The effect of signals from a command's first line on; imports next to nothing, so that it takes no time."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the core of signal, whose import takes milliseconds
import os
import sys


def handle_signals() -> None:
    """As ``server.cli.signals.interrupts_end``, and for ``serve`` as its ``signals_end``.

    An exception would show the traceback of the import that it interrupts. SIGTERM would end the process by
    that signal, as a failure; the first process of a container would not even notice it.
    """
    _signal.signal(_signal.SIGINT, lambda *_: os._exit(130))
    if sys.argv[1:2] != ["serve"]:
        return
    _signal.signal(_signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(_signal, "SIGHUP") and _signal.getsignal(_signal.SIGHUP) != _signal.SIG_IGN:  # as under nohup
        _signal.signal(_signal.SIGHUP, lambda *_: os._exit(0))
