"""Real servers to measure: ``longspan serve`` in processes of its own, ended when done with."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

_READY = re.compile(r" on (\S+):(\d+) .*metrics http://\S+:(\d+)/metrics")
_STOP_SECONDS = 60.0
_SENTENCE = "longspan: "  # before what a command ends with


class Address(NamedTuple):
    """Where a server is, and its process."""

    host: str
    port: int
    metrics_port: int
    pid: int

    @property
    def metrics_url(self) -> str:
        """Where its metrics are."""
        return f"http://{self.host}:{self.metrics_port}/metrics"


class NotStartedError(RuntimeError):
    """A server did not start; the message ends with why, or the last lines that it wrote."""


@contextmanager
def serve(*arguments: str, ports: Sequence[int] = (0, 0)) -> Iterator[Address]:
    """A server of its own, while the block runs.

    Args:
        arguments: of ``longspan serve``.
        ports: of gRPC and of the metrics; 0 takes a free one.

    Raises:
        NotStartedError: it ended instead.
    """
    command = [
        *(sys.executable, "-m", "server.cli", "serve"),
        *("--port", str(ports[0]), "--metrics-port", str(ports[1]), *arguments),
    ]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            match = _READY.search(process.stdout.readline())
            if match is None:
                process.wait(_STOP_SECONDS)
                log.seek(0)
                raise NotStartedError(
                    f"longspan serve {' '.join(arguments)} did not start: {_reason(log.read())}"
                )
            yield Address(match[1], int(match[2]), int(match[3]), process.pid)
        finally:
            _end(process)


def _reason(log: str) -> str:
    """The sentence that a command ended with; else the last lines of its log."""
    lines = log.splitlines()
    ends = [number for number, line in enumerate(lines) if line.startswith(_SENTENCE)]
    return "\n".join(lines[ends[-1] :] if ends else lines[-5:]).removeprefix(_SENTENCE)


def _end(process: subprocess.Popen[str]) -> None:
    """Asks the server to end, which ends its engine too; insists after a minute."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
