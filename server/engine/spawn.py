"""Starts an engine process. Imports next to nothing, so that it can be done first of all."""

from __future__ import annotations

import os
import subprocess
import sys
from socket import socket, socketpair
from typing import NamedTuple

from server.engine.cores import usable_cores


class Spawned(NamedTuple):
    """An engine process that has not been told yet what to serve.

    Attributes:
        process: the process.
        stream: the server process's end of the link; when it is closed, the engine process ends.
    """

    process: subprocess.Popen[bytes]
    stream: socket

    def kill(self) -> None:
        """Ends it."""
        self.stream.close()
        self.process.kill()
        self.process.wait()


def spawn_engine(threads: int | None) -> Spawned:
    """An engine process that imports what it needs while the caller does the same.

    It waits for its ``Launch`` on the link.

    Args:
        threads: of the settings.
    """
    count = str(threads or usable_cores())
    ours, theirs = socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.engine.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            # torch reads the number of threads when it is imported, and a later call doesn't bind them.
            env={**os.environ, "OMP_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"},
        )
    return Spawned(process, ours)
