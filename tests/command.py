"""``longspan`` within this process, which spares a test the imports of another."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from unittest.mock import patch

import pytest

from loadtest.cli.application import run

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def longspan(
    *arguments: str, input: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command; its standard streams are no terminals.

    Args:
        arguments: of the command, without its own name.
        input: all of its standard input.
        environment: variables that are set beside those of this process meanwhile.
    """
    streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdout", "stderr")}
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    code: object = 0
    # All variables are put back, those too that the command sets: processes started later would have them.
    with patch.dict(os.environ, environment or {}), pytest.MonkeyPatch.context() as own:
        own.setattr(sys, "argv", ["longspan", *arguments])
        # Else click takes its name for the command's.
        own.setattr(sys.modules["__main__"], "__package__", None)
        own.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()), "utf-8"))
        for name, stream in streams.items():
            own.setattr(sys, name, stream)
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    told = {}
    for name, stream in streams.items():
        stream.flush()
        told[name] = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(["longspan", *arguments], code, told["stdout"], told["stderr"])
