"""Models that were made to harm: they are refused soon, in little memory.

The real command is asked in ``make stress``, since most of its time is for imports.
"""

import contextlib
import itertools
import os
import resource
import time
from pathlib import Path

import psutil
import pytest

from server.errors import RefusedError
from tests.e2e.server import Server
from tests.models.changes import copy
from tests.models.hostile import REFUSED, start

NAMES = ("a hidden size of 65,536", "a million layers", "a million brackets")
# The first two took over 6 GiB, and over 75 s.
MOST_SECONDS = 30.0
MOST_WAIT = 240.0  # beside other tests
MOST_BYTES = 3 << 29


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_model_is_refused_soon_and_small(name, tiny, tmp_path):
    change, sentence = REFUSED[name]
    folder = copy(tiny, tmp_path / "model")
    change(folder)
    begun, (limit, most) = time.process_time(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MOST_BYTES, most))
    try:
        with pytest.raises(RefusedError, match=sentence):
            start(folder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    assert time.process_time() - begun < MOST_SECONDS


@pytest.mark.stress
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_model_ends_the_command_with_a_sentence(name, tiny_packed, tmp_path):
    option, good, *rest = tiny_packed
    change, _ = REFUSED[name]
    folder = copy(Path(good), tmp_path / "model")
    change(folder)
    server = Server(option, folder, *rest, wait=False)
    code, seconds, resident, processes = _waited_for(server.process.pid)
    server.process.returncode = code
    told = server.log
    server.stop()
    assert code == 1
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("longspan: ")
    assert seconds < MOST_SECONDS
    assert resident < MOST_BYTES
    assert processes > 1, "the engine's memory was not seen"


def _waited_for(pid: int) -> tuple[int, float, int, int]:
    """Waits for a process, and kills it with its children when that takes too long.

    Returns:
        Its exit code; with the children that it waited for, seconds of processor time; with all of them the
        most bytes in memory; and how many processes were seen at once.
    """
    end, resident, processes = time.monotonic() + MOST_WAIT, 0, 0
    while True:
        peaks = _peaks(pid)
        resident, processes = max(resident, sum(peaks)), max(processes, len(peaks))
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            seconds = usage.ru_utime + usage.ru_stime
            return os.waitstatus_to_exitcode(status), seconds, resident, processes
        if time.monotonic() > end:
            for process in (*psutil.Process(pid).children(), psutil.Process(pid)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.1)


def _peaks(pid: int) -> list[int]:
    """The most bytes that a process and its children have had in memory, each at its own moment."""
    found = []
    with contextlib.suppress(OSError):  # one has just ended
        children = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
        for each in (str(pid), *itertools.chain(*children)):
            # Not ru_maxrss, which begins with the memory of the process that forked.
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
            found += [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
    return found
