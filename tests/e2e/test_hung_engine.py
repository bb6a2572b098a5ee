"""Engines that hang or are killed, and servers that end meanwhile: real processes, stopped by signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from longspan import LongspanError, UnavailableError
from server.engine.ipc.spawn import STACKS_SIGNAL
from tests.e2e.server import Server
from tests.e2e.test_lifecycle import in_background, read_until_error
from tests.processes import wait_ended, wait_until

pytestmark = pytest.mark.long

LIMIT = 2.0
# A look every half second: one to begin with, one at the end. The rest is for the machine: without looks a
# stream of a hung engine would wait for ever.
NOTICED = LIMIT + 20.0
RESTARTED = (
    *("--engine-step-timeout", str(LIMIT), "--drain-seconds", "1"),
    *("--on-engine-failure", "restart"),
)
PARENT = """
import sys, time
from pathlib import Path
from server.engine.ipc.spawn import spawn_engine
print(spawn_engine(1, Path(sys.argv[1])).process.pid, flush=True)
time.sleep(600)
"""


def begin_stream(server):
    """An endless stream that has begun, and will tell how and when it failed."""
    begun = threading.Event()
    stream = in_background(lambda: read_until_error(server, begun))
    assert begun.wait(20)
    return stream


def test_a_hung_engine_is_noticed_and_another_gives_the_same_answers(started):
    server = started(*RESTARTED)
    with server.client() as client:
        before = client.generate("hello", max_tokens=20, temperature=0)
        stream = begin_stream(server)
        first = server.engine_pid
        os.kill(first, signal.SIGSTOP)
        stopped = time.monotonic()
        assert client.health(), "a step may take a while"
        wait_until(lambda: server.metrics()["longspan_engine_step_age_seconds"] > 0 or stream.done())
        error, when = stream.result(NOTICED + 5)
        assert isinstance(error, UnavailableError)
        assert "was killed (--engine-step-timeout)" in str(error)
        assert LIMIT - 0.5 <= when - stopped <= NOTICED
        wait_until(lambda: server.restarts("hung") == 1)
        client.wait_until_ready(timeout=120)
        assert server.engine_pid != first
        assert not psutil.pid_exists(first)
        after = client.generate("hello", max_tokens=20, temperature=0)
    assert list(after.token_ids) == list(before.token_ids)
    assert server.restarts("hung") == 1
    assert "and is started again now" in server.log


def test_a_killed_engine_ends_streams_at_once_and_another_gives_the_same_answers(started):
    server = started(*RESTARTED)
    with server.client() as client:
        before = client.generate("hello", max_tokens=5, temperature=0)
        wait_until(lambda: len(server.engine_pids) == 2)
        first, spare = server.engine_pids
        stream = begin_stream(server)
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        error, when = stream.result(10)
        assert isinstance(error, UnavailableError)
        assert when - killed < 10, "at once, but for a busy machine"
        wait_until(lambda: server.restarts("died") == 1)
        client.wait_until_ready(timeout=120)
        assert server.engine_pid == spare, "it had been started ahead"
        after = client.generate("hello", max_tokens=5, temperature=0)
    assert list(after.token_ids) == list(before.token_ids)
    assert "signal 9" in server.log


def test_a_server_whose_engine_hangs_ends_in_time(started):
    """And with it the process that is kept to take the engine's place."""
    server = started(*RESTARTED)
    wait_until(lambda: len(server.engine_pids) == 2)
    engines = server.engine_pids
    stream = begin_stream(server)
    os.kill(engines[0], signal.SIGSTOP)
    asked = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0
    # After draining half a second for gRPC's last words and 1.75 s for the rest; ten are for the machine.
    assert time.monotonic() - asked <= 1 + 0.5 + 1.75 + 10
    assert not any(map(psutil.pid_exists, engines))
    error, _ = stream.result(60)
    assert isinstance(error, LongspanError)


def test_a_hung_engine_ends_with_its_server(tmp_path):
    """By the kernel, however little of a server its parent is."""
    command = [sys.executable, "-c", PARENT, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        engine = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: handles(engine, STACKS_SIGNAL))  # it asks for that handler after asking the kernel
        engine.suspend()
        parent.kill()
    wait_ended(engine, 60)


def handles(process, number):
    """Whether it has a handler of a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return int(mask, 16) >> (number - 1) & 1


@pytest.mark.stress
def test_an_engine_that_hangs_while_it_loads_again_is_noticed_too(started):
    limit = 20.0  # so long may a good start take on a busy machine
    server = started("--engine-load-timeout", str(limit), "--on-engine-failure", "restart")
    wait_until(lambda: len(server.engine_pids) == 2)  # the second is the next one to load
    first, second = server.engine_pids
    os.kill(second, signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    with server.client() as client:
        time.sleep(limit - 1)
        assert not client.health()
        client.wait_until_ready(timeout=90)
        assert client.generate("hello", max_tokens=5).completions
    assert not psutil.pid_exists(second)
    assert "has not answered its launch for 20.0 s and was killed (--engine-load-timeout)" in server.log
    assert server.restarts("not_ready") == 1


def test_an_engine_that_hangs_while_it_loads_ends_the_start(tiny_packed):
    with Server(*tiny_packed, "--engine-load-timeout", str(LIMIT), wait=False) as server:
        wait_until(lambda: server.engine_pids)
        os.kill(server.engine_pid, signal.SIGSTOP)
        assert server.process.wait(60) == 1
        assert "the engine did not start: the engine has not answered its launch for 2.0 s" in server.log


def test_a_pause_is_no_hung_engine_but_one_that_hangs_idle_is_noticed(started):
    server = started("--engine-step-timeout", str(LIMIT))
    engine = server.engine_pid
    stream = begin_stream(server)
    for process in (engine, server.process.pid):
        os.kill(process, signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    for process in (server.process.pid, engine):
        os.kill(process, signal.SIGCONT)
    error, _ = stream.result(60)
    assert error is None
    assert server.engine_pid == engine
    server.wait_idle()

    os.kill(engine, signal.SIGSTOP)
    time.sleep(LIMIT + 1)
    with server.client() as client:
        assert client.health(), "it has nothing to do"
        asked = time.monotonic()
        with pytest.raises(UnavailableError, match="has not read its messages"):
            client.generate("hello", max_tokens=5)
        assert time.monotonic() - asked <= NOTICED
    assert server.process.wait(60) == 1
    assert "the engine died (the engine has not read its messages for" in server.log
