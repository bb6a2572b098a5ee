"""Real servers to measure: ``longspan serve`` in separate processes, ended after use.

They end when this process does, however it dies: each reads from a pipe whose other end only this one holds.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil

_READY = re.compile(r" on (\S+):(\d+)\n.*metrics http://\S+:(\d+)/metrics")  # in the first two lines
_OWN = "longspan: "  # the beginning of the command's last sentence
# For the program that measures alone, whatever the environment or longspan.toml says of a server for others.
_PRIVATE = (
    *("--host", "127.0.0.1", "--metrics-host", "127.0.0.1", "--server-info", "--abort"),
    *("--tls-certificate", "", "--tls-key", "", "--tls-client-ca", "", "--identities", ""),
    *("--metrics", "--no-metrics-tls", "--no-metrics-auth"),
)
_STOP_SECONDS = 60.0
_ENGINE_SECONDS = 5.0  # that engines may outlive their server


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
def serve(
    *arguments: str, ports: Sequence[int] = (0, 0), begun: Callable[[int], object] = lambda pid: None
) -> Iterator[Address]:
    """A server of its own, while the block runs.

    Args:
        arguments: of ``longspan serve``.
        ports: of gRPC and of the metrics; 0 takes a free one.
        begun: told the process's id as soon as there is one; a signal to it ends the wait for the server.

    Raises:
        NotStartedError: it ended instead.
    """
    command = [
        *(sys.executable, "-P", "-m", "server.cli", "serve"),
        *(
            "--port",
            str(ports[0]),
            "--metrics-port",
            str(ports[1]),
            "--end-with-stdin",
            *_PRIVATE,
            *arguments,
        ),
    ]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            begun(process.pid)
            assert process.stdout is not None
            match = _READY.search(process.stdout.readline() + process.stdout.readline())
            if match is None:
                code = process.wait(_STOP_SECONDS)
                log.seek(0)
                why = _why(log.read(), code)
                raise NotStartedError(f"longspan serve {' '.join(arguments)} did not start: {why}")
            yield Address(match[1], int(match[2]), int(match[3]), process.pid)
        finally:
            _end(process)


def _why(log: str, code: int) -> str:
    """Why a server ended: its own sentences, or else the last lines that it wrote."""
    lines = log.splitlines()
    if code < 0:
        return "\n".join([*lines[-5:], f"signal {-code} ended it"])
    own = [line.removeprefix(_OWN) for line in lines if line.startswith(_OWN)]
    return "\n".join(own or lines[-5:]) or f"it ended with exit code {code} and no word"


def _end(process: subprocess.Popen[str]) -> None:
    """Asks the server to end, which ends its engine too; insists after a minute, also with the engine."""
    if process.poll() is None:
        children = _descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in children:
            with contextlib.suppress(psutil.Error):
                if child.is_running() and not _gone(child, _ENGINE_SECONDS):
                    child.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _gone(process: psutil.Process, seconds: float) -> bool:
    """It ends within so many seconds; its parent need not have waited for it yet."""
    end = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
