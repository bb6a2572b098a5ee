"""Models that were made to harm, given to the real command: it ends with a sentence, soon and small."""

import time

import psutil
import pytest

from tests.e2e.server import Server
from tests.models.hostile import REFUSED, copy

# Beside other tests. The first two took over 6 GiB, and over 75 s.
MOST_SECONDS = 30.0
MOST_BYTES = 3 << 29


@pytest.mark.parametrize("name", ["a hidden size of 65,536", "a million layers", "a million brackets"])
def test_a_hostile_model_ends_the_command_with_a_sentence(name, tiny_packed, tmp_path):
    option, good, *rest = tiny_packed
    change, _ = REFUSED[name]
    folder = copy(good, tmp_path / "model")
    change(folder)
    server = Server(option, folder, *rest, wait=False)
    begun, most = time.monotonic(), 0
    while server.process.poll() is None and time.monotonic() - begun < MOST_SECONDS:
        most = max(most, _resident(server.process.pid))
        time.sleep(0.02)
    told, code = server.log, server.stop()
    assert code == 1
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("longspan: ")
    assert most < MOST_BYTES


def _resident(pid: int) -> int:
    """Bytes of the process and its children that are in memory."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:  # one has just ended
        pass
    return total
