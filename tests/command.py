"""``longspan`` within this process, which spares a test the imports of another."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO
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
    stdout, stderr = _stream(), _stream()
    code = _run(arguments, input, stdout, stderr, environment or {})
    return subprocess.CompletedProcess(["longspan", *arguments], code, _told(stdout), _told(stderr))


def on_a_terminal(*arguments: str, errors: bool) -> list[str]:
    """The lines that a command prints on a terminal, some kilobytes at most.

    Args:
        arguments: of the command, without its own name.
        errors: whether its standard error is the terminal, too.
    """
    ours, theirs = pty.openpty()
    try:
        with open(theirs, "w", encoding="utf-8") as terminal:
            _run(arguments, "", terminal, terminal if errors else _stream(), {})
        return os.read(ours, 4000).decode().replace("\r\n", "\n").splitlines()
    finally:
        os.close(ours)


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), "utf-8")


def _told(stream: io.TextIOWrapper) -> str:
    stream.flush()
    told: bytes = stream.buffer.getvalue()  # type: ignore[attr-defined]
    return told.decode()


def _run(
    arguments: Sequence[str], input: str, stdout: TextIO, stderr: TextIO, environment: Mapping[str, str]
) -> int:
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    code: object = 0
    # All variables are put back, those too that the command sets: processes started later would have them.
    with patch.dict(os.environ, environment), pytest.MonkeyPatch.context() as own:
        own.setattr(sys, "argv", ["longspan", *arguments])
        # Else click takes its name for the command's.
        own.setattr(sys.modules["__main__"], "__package__", None)
        own.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()), "utf-8"))
        own.setattr(sys, "stdout", stdout)
        own.setattr(sys, "stderr", stderr)
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    return code
