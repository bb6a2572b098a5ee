"""Models that were made to harm, given to the real command: it ends with a sentence, soon and small."""

import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.server import Server
from tests.models.changes import copy
from tests.models.hostile import REFUSED

# The first two took over 6 GiB, and over 75 s. Imports take most of the time now.
MOST_SECONDS = 30.0
MOST_WAIT = 240.0  # beside other tests
MOST_BYTES = 3 << 29


@pytest.mark.parametrize(
    "name",
    [
        "a hidden size of 65,536",
        pytest.param("a million layers", marks=pytest.mark.stress),
        pytest.param("a million brackets", marks=pytest.mark.stress),
    ],
)
def test_a_hostile_model_ends_the_command_with_a_sentence(name, tiny_packed, tmp_path):
    option, good, *rest = tiny_packed
    change, _ = REFUSED[name]
    folder = copy(Path(good), tmp_path / "model")
    change(folder)
    server = Server(option, folder, *rest, wait=False)
    begun, seconds, resident = time.monotonic(), 0.0, 0
    while server.process.poll() is None and time.monotonic() - begun < MOST_WAIT and seconds < MOST_SECONDS:
        used = _used(server.process.pid)
        seconds, resident = max(seconds, used[0]), max(resident, used[1])
        time.sleep(0.05)
    told, code = server.log, server.stop()
    assert code == 1
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("longspan: ")
    assert seconds < MOST_SECONDS
    assert resident < MOST_BYTES


def _used(pid: int) -> tuple[float, int]:
    """Seconds that the processor has worked for the process and its children, and their bytes in memory."""
    seconds, resident = 0.0, 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            seconds += sum(process.cpu_times()[:2])
            resident += process.memory_info().rss
    except psutil.Error:  # one has just ended
        pass
    return seconds, resident
