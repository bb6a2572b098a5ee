"""Servers that start from packed weights on disk, and the remains of one that never served."""

import os
import time
from socket import socketpair

import psutil
import pytest

from server.engine.ipc.process import serve
from server.engine.ipc.pulse import Pulse, open_memory
from server.engine.ipc.spare import Spare
from server.engine.ipc.spawn import spawn_engine
from server.engine.ipc.wire import EngineEnd
from tests.e2e.server import Server

ARGUMENTS = ("--weights", "int8", "--kv-memory", "8MiB", "--threads", "1")


def tokens(server):
    with server.client() as client:
        return client.generate("def", max_tokens=12, temperature=0.0, ignore_eos=True).token_ids


@pytest.mark.stress
def test_two_first_starts_at_once_share_their_packed_weights(tiny, tmp_path):
    arguments = ("--model", tiny, "--cache-dir", tmp_path, *ARGUMENTS)
    with Server(*arguments, wait=False) as one, Server(*arguments, wait=False) as other:
        one.wait_ready()
        other.wait_ready()
        expected = tokens(one)
        assert tokens(other) == expected
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    assert [path for path in file.parent.iterdir() if "partial" in path.name] == []
    assert list((tmp_path / "kernels").glob("*.so")), "compiled kernels follow --cache-dir"
    with Server(*arguments) as again:
        assert f"packed by an earlier start in {file}" in again.log
        assert tokens(again) == expected
        mapped = {entry.path for entry in psutil.Process(again.engine_pid).memory_maps()}
        assert str(file) in mapped


def test_a_process_that_was_started_ahead_is_taken_once_and_only_alive(tmp_path):
    spare = Spare(1, tmp_path, None)
    assert spare.take() is None
    spare.keep()
    spare.keep()
    taken = spare.take()
    try:
        assert taken.process.poll() is None
        assert spare.take() is None
        spare.keep()
        spare._spawned.process.kill()
        spare._spawned.process.wait()
        assert spare.take() is None
        spare.keep()
        died = spare._spawned
        died.process.kill()
        died.process.wait()
        spare.keep()
        assert spare._spawned.process.poll() is None, "another one in place of one that has died"
    finally:
        taken.end()
        last = spare._spawned
        spare.end()
    assert last.process.returncode == -9


def test_an_engine_process_knows_where_kernels_are_kept(tmp_path):
    spawned = spawn_engine(1, tmp_path)
    try:
        process, end = psutil.Process(spawned.process.pid), time.monotonic() + 5
        while not (environment := process.environ()):  # the kernel has not laid it out yet
            assert time.monotonic() < end
        assert environment["LONGSPAN_CACHE_DIR"] == str(tmp_path)
    finally:
        spawned.end()


def test_an_engine_that_is_told_nothing_ends():
    ours, theirs = socketpair()
    ours.close()
    memory = open_memory()
    pulse = Pulse(memory)
    os.close(memory)
    assert serve(EngineEnd(theirs), pulse) == 1
    theirs.close()
