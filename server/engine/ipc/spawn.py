"""Starts an engine process. Imports little, so that it can be the first thing to run."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket, socketpair
from typing import NamedTuple

from server.engine.cores import usable_cores
from server.engine.ipc.pulse import Pulse, open_memory

log = logging.getLogger("longspan.link")

_SPIN = "5000"
"""Rounds, some 50 microseconds, that GNU OpenMP's threads wait for each other before they sleep.

That is longer than between two layers of a step, and short beside the milliseconds that a thread is without a
core; OpenMP's default, 300,000 rounds, makes all others wait through these."""

KILL_SECONDS = 0.5
"""For a killed process, which ends within milliseconds, unless a device's driver holds it."""

STACKS_SIGNAL = signal.SIGUSR1
"""Has an engine process write the Python stacks of its threads to standard error, and go on."""


class Spawned(NamedTuple):
    """An engine process that has not got its ``Launch`` yet.

    Attributes:
        process: the process.
        stream: the server process's end of the link; when it is closed, the engine process ends.
        pulse: what the process is at.
    """

    process: subprocess.Popen[bytes]
    stream: socket
    pulse: Pulse

    def end(self) -> None:
        """Ends it, within half a second."""
        self.stream.close()
        self.process.kill()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("an engine process was killed and does not end, as where a driver holds it")


@contextmanager
def shielded() -> Iterator[None]:
    """A process started meanwhile never gets Ctrl-C, which a terminal sends to its whole group.

    It inherits the signals that are blocked. One that comes meanwhile reaches this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn_engine(threads: int | None, cache_dir: Path) -> Spawned:
    """An engine process that imports what it needs while the caller does the same.

    It waits for its ``Launch`` on the link.

    Args:
        threads: of the settings.
        cache_dir: of the settings; compiled kernels are kept there too.
    """
    count = str(threads or usable_cores())
    ours, theirs = socketpair()
    with theirs, _memory() as memory, shielded():
        pulse = Pulse(memory)
        descriptors = (theirs.fileno(), memory)
        arguments = map(str, (*descriptors, os.getpid()))
        process = subprocess.Popen(
            # Not the working directory first: a user may have a server.py there.
            [sys.executable, "-P", "-m", "server.engine.ipc.process", *arguments],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            # torch reads the number of threads when it is imported, and a later call doesn't bind them.
            env={
                **({} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": _SPIN}),
                **os.environ,
                "OMP_NUM_THREADS": count,
                "TOKENIZERS_PARALLELISM": "false",
                "LONGSPAN_CACHE_DIR": str(cache_dir),  # read by attention, which knows no settings
            },
        )
    return Spawned(process, ours, pulse)


@contextmanager
def _memory() -> Iterator[int]:
    descriptor = open_memory()
    try:
        yield descriptor
    finally:
        os.close(descriptor)
