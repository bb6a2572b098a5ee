"""Starts an engine process. Imports next to nothing, so that it can be done first of all."""

from __future__ import annotations

import os
import subprocess
import sys


def spawn_engine(threads: int | None) -> subprocess.Popen[bytes]:
    """An engine process that imports what it needs while the caller does the same.

    It waits for its ``Launch`` as a line of JSON in its standard input, and ends when that is closed.

    Args:
        threads: of the settings.
    """
    count = str(threads or len(os.sched_getaffinity(0)))
    return subprocess.Popen(
        [sys.executable, "-m", "server.engine.process"],
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno(),
        # torch reads the number of threads when it is imported, and a later call doesn't bind them.
        env={**os.environ, "OMP_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"},
    )
