"""The server process's side of the link, with engine processes that behave badly."""

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager

import msgspec
import pytest

from server.engine.ipc import link
from server.engine.ipc.link import EngineClient
from server.engine.ipc.output import EngineDeadError
from server.engine.ipc.pulse import Pulse, open_memory
from server.engine.ipc.spawn import Spawned
from server.engine.ipc.wire import EngineEnd, frame
from server.errors import RefusedError
from server.messages import (
    Abort,
    Failed,
    Launch,
    Loading,
    Sampling,
    SequenceOutput,
    Stats,
    StepOutput,
    Submit,
    ToEngine,
)
from server.settings import Settings
from tests.api.conftest import until
from tests.api.fake_engine import READY

encode = msgspec.msgpack.encode
OUTPUT = StepOutput(1.0, [SequenceOutput(1, [7])], Stats())

# Says what it is to say first, then, once something follows its launch, the rest, and ends as it was told to.
_PEER = """
import os, pathlib, signal, socket, sys
stream, folder, end = socket.socket(fileno=int(sys.argv[1])), pathlib.Path(sys.argv[2]), sys.argv[3]
stream.sendall((folder / "first").read_bytes())
if then := (folder / "then").read_bytes():
    launch = int.from_bytes(stream.recv(8, socket.MSG_WAITALL)[:4], "big")
    stream.recv(launch, socket.MSG_WAITALL)
    stream.recv(1)
    stream.sendall(then)
os.kill(os.getpid(), signal.SIGKILL) if end == "killed" else sys.exit(int(end))
"""


def pulse():
    memory = open_memory()
    try:
        return Pulse(memory)
    finally:
        os.close(memory)


@asynccontextmanager
async def engine(tmp_path, command, theirs, ours, limit=0.0, load_limit=0.0):
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: ASYNC220 (as ``spawn_engine``)
    settings = Settings(engine_step_timeout=limit, engine_load_timeout=load_limit)
    client = EngineClient(settings, tmp_path, Spawned(process, ours, pulse()))
    try:
        await client.start()
        yield client
    finally:
        process.kill()
        await client.stop()
        process.wait()


def peer(tmp_path, *, end, first=b"", then=b""):
    """A client of an engine process that sends ``first``, and ``then`` after the first submission."""
    ours, theirs = socket.socketpair()
    (tmp_path / "first").write_bytes(first)
    (tmp_path / "then").write_bytes(then)
    command = [sys.executable, "-c", _PEER, str(theirs.fileno()), str(tmp_path), end]
    return engine(tmp_path, command, theirs, ours)


@asynccontextmanager
async def deaf(tmp_path, limit=0.0):
    """A client of an engine that is ready and has not read anything yet, and the engine's end of the link."""
    ours, theirs = socket.socketpair()
    wire = EngineEnd(theirs.dup())
    wire.send(encode(READY))
    async with engine(tmp_path, ["sleep", "60"], theirs, ours, limit) as client:
        await client.wait_ready()
        yield client, wire


def sequence(id_, prompt=1):
    return Submit(id=id_, prompt=[40_000] * prompt, sampling=Sampling(), max_tokens=5)


async def test_an_engine_that_dies_in_the_middle_of_a_message(tmp_path):
    half = frame(encode(OUTPUT), 2)[:-3]
    then = frame(encode(OUTPUT), 1) + half
    async with peer(tmp_path, first=frame(encode(READY), 0), then=then, end="killed") as client:
        await client.wait_ready()
        stream = client.submit([sequence(1)])
        async with asyncio.timeout(5):
            assert await stream.take(99) == [(OUTPUT.sequences[0], OUTPUT.time)]
            with pytest.raises(EngineDeadError, match="signal 9"):
                await stream.take(99)
            assert "signal 9" in await client.wait_dead()
        with pytest.raises(EngineDeadError, match="signal 9"):
            client.submit([sequence(2)])


async def test_the_last_words_of_an_engine_are_read_to_the_end(tmp_path):
    words = "it does not fit; " * 10_000
    async with peer(
        tmp_path, first=frame(encode(READY), 0), then=frame(encode(Failed(words)), 1), end="1"
    ) as client:
        await client.wait_ready()
        stream = client.submit([sequence(1)])
        async with asyncio.timeout(5):
            with pytest.raises(EngineDeadError) as caught:
                await stream.take(99)
        assert str(caught.value) == words


@pytest.mark.parametrize(
    ("first", "error"),
    [(frame(encode(Failed("no")), 0), RefusedError), (b"", EngineDeadError)],
    ids=["refuses", "dies"],
)
async def test_an_engine_that_never_becomes_ready(tmp_path, first, error):
    async with peer(tmp_path, first=first, end="1") as client, asyncio.timeout(5):
        with pytest.raises(error, match="^no$" if first else "exit code 1"):
            await client.wait_ready()


async def test_submissions_and_aborts_while_the_engine_is_busy_reach_it_in_order(tmp_path):
    async with deaf(tmp_path) as (client, wire):
        begun = [sequence(id_, prompt=200_000) for id_ in (1, 2, 3)]
        streams = [client.submit([item]) for item in begun]
        streams[1].abort()
        assert await streams[1].take(99) == []
        payloads = []
        while len(payloads) < 5:
            await asyncio.sleep(0.001)  # what did not fit follows from the loop
            if wire.poll(0):
                payloads.append(wire.receive())
        assert msgspec.msgpack.decode(payloads[0], type=Launch).folder == str(tmp_path)
        messages = [msgspec.msgpack.decode(payload, type=ToEngine) for payload in payloads[1:]]
        assert messages == [*begun, Abort([2])]


async def test_an_engine_that_reads_no_more_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "_STOP_SECONDS", 0.1)
    async with deaf(tmp_path) as (client, _):
        stream = client.submit([sequence(1, prompt=500_000)])
        async with asyncio.timeout(5):
            await client.stop()
            with pytest.raises(EngineDeadError, match="shutting down"):
                await stream.take(99)


async def test_an_engine_that_leaves_a_request_unread_is_given_up_and_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "LOOK_SECONDS", 0.05)
    async with deaf(tmp_path, limit=0.3) as (client, _):
        await asyncio.sleep(0.5)
        assert client.state == "ready", "an idle engine may be at rest for any time"
        stream = client.submit([sequence(1)])
        async with asyncio.timeout(5):
            with pytest.raises(EngineDeadError, match=r"has not read .* for 0\.\d s and was killed"):
                await stream.take(99)
            assert "--engine-step-timeout" in await client.wait_dead()
            assert await client._exit < 0, "by a signal"
        assert client.hung
        assert client.step_age == 0


async def test_without_a_limit_the_age_is_told_and_no_engine_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "LOOK_SECONDS", 0.02)
    async with deaf(tmp_path) as (client, _):
        client.submit([sequence(1)])
        await until(lambda: client.step_age > 0.2)
        assert client.state == "ready"


async def test_an_engine_that_hangs_writes_its_stacks_before_it_is_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(link, "LOOK_SECONDS", 0.05)
    hangs = (
        "import faulthandler, sys, time; from server.engine.ipc.spawn import STACKS_SIGNAL;"
        "faulthandler.register(STACKS_SIGNAL);"
        "print('registered', file=sys.stderr, flush=True);"
        "time.sleep(60)"
    )
    ours, theirs = socket.socketpair()
    EngineEnd(theirs.dup()).send(encode(READY))
    async with engine(tmp_path, [sys.executable, "-c", hangs], theirs, ours, 0.3) as client:
        await client.wait_ready()
        await until(lambda: "registered" in capfd.readouterr().err, seconds=10)
        client.submit([sequence(1)])
        async with asyncio.timeout(5):
            await client.wait_dead()
    assert "most recent call first" in capfd.readouterr().err


async def test_an_engine_process_that_does_not_answer_its_launch_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(link, "_ANSWER_SECONDS", 0.2)
    ours, theirs = socket.socketpair()
    async with engine(tmp_path, ["sleep", "60"], theirs, ours, load_limit=3) as client, asyncio.timeout(5):
        said = r"has not answered its launch for 0\.2\d? s and was killed \(--engine-load-timeout 0 sets no"
        with pytest.raises(EngineDeadError, match=said):
            await client.wait_ready()
        assert await client._exit == -9


async def test_an_engine_that_stays_in_one_stage_of_loading_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "LOOK_SECONDS", 0.05)
    ours, theirs = socket.socketpair()
    wire = EngineEnd(theirs.dup())
    async with engine(tmp_path, ["sleep", "60"], theirs, ours, load_limit=0.3) as client, asyncio.timeout(9):
        for part in range(10):
            wire.send(encode(Loading("reading the weights", part / 10)))
            await asyncio.sleep(0.1)
        assert client.state == "loading", "it goes on"
        wire.send(encode(Loading("checking", 0.9)))
        with pytest.raises(
            EngineDeadError, match=r"^the engine has been checking for 0\.\d s and was killed \(--engine-load"
        ):
            await client.wait_ready()
        assert client.hung
        assert await client._exit < 0, "by a signal"


async def test_without_a_limit_loading_may_take_any_time(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(link, "_ANSWER_SECONDS", 0.05)
    ours, theirs = socket.socketpair()
    wire = EngineEnd(theirs.dup())
    async with engine(tmp_path, ["sleep", "60"], theirs, ours) as client:
        await asyncio.sleep(0.3)
        wire.send(encode(Loading("checking", 0.9)))
        await asyncio.sleep(0.3)
        assert client.state == "loading"
        wire.send(encode(READY))
        async with asyncio.timeout(5):
            await client.wait_ready()


async def test_a_broken_link_is_the_reason_that_is_told(tmp_path):
    async with peer(tmp_path, first=frame(encode(READY), 1), end="0") as client, asyncio.timeout(5):
        with pytest.raises(EngineDeadError, match="message 1 came where message 0 was due"):
            await client.wait_ready()


@pytest.mark.parametrize(
    "message", [b"\xc1", encode(Launch("", "")), encode(OUTPUT)[:-2]], ids=["bytes", "type", "cut"]
)
async def test_a_message_that_is_none_breaks_the_link(tmp_path, message):
    async with (
        peer(tmp_path, first=frame(encode(READY), 0), then=frame(message, 1), end="0") as client,
        asyncio.timeout(5),
    ):
        await client.wait_ready()
        stream = client.submit([sequence(1)])
        with pytest.raises(
            EngineDeadError, match="the link to the engine is broken: a message can't be read"
        ):
            await stream.take(99)


async def test_a_process_whose_link_can_not_begin_is_ended(tmp_path, monkeypatch):
    async def refuse(stream):
        raise OSError("too many open files")

    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220 (as ``spawn_engine``)
    client = EngineClient(Settings(), tmp_path, Spawned(process, ours, pulse()))
    monkeypatch.setattr(client._wire, "connect", refuse)
    with pytest.raises(OSError, match="too many"):
        await client.start()
    assert process.poll() == -9
