"""Messages over the link's socket: cut anywhere, large, to a peer that is slow, stuck or closed."""

import asyncio
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.ipc.wire import EngineEnd, Frames, LostFrameError, ServerEnd, frame

# More than the kernel holds for a reader that doesn't read.
LARGE = [bytes([number]) * (3 << 20) for number in range(4)]
MIXED = [b"first", LARGE[0], b"", b"between", *LARGE[1:], b"last"]


def framed(*messages: bytes) -> bytes:
    return b"".join(frame(message, number) for number, message in enumerate(messages))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 2500), max_size=12))
def test_messages_are_the_same_wherever_the_stream_is_cut(messages, cuts):
    whole = framed(*messages)
    ends = sorted({min(cut, len(whole)) for cut in cuts} | {len(whole)})
    frames, seen, begin = Frames(), [], 0
    for end in ends:
        seen += frames.feed(whole[begin:end])
        # Nothing that is complete is kept back.
        complete = 0
        while complete < len(messages) and len(framed(*messages[: complete + 1])) <= end:
            complete += 1
        assert len(seen) == complete
        begin = end
    assert seen == messages


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, EngineEnd(theirs)


class Served:
    """The server process's end in this loop, with what it was sent."""

    def __init__(self):
        self.received = []
        self.wire = ServerEnd(self.received.append)

    async def until(self, count):
        async with asyncio.timeout(10):
            while len(self.received) < count:  # noqa: ASYNC110 (the loop is what is under test)
                await asyncio.sleep(0.002)


@pytest.fixture
async def served(pair):
    end = Served()
    await end.wire.connect(pair[0])
    yield end
    end.wire.close()
    async with asyncio.timeout(5):
        await end.wire.lost.wait()


def receive_all(engine, count):
    received = []
    while len(received) < count:
        assert engine.poll(10_000), "nothing came"
        received.append(engine.receive())
    return received


async def test_an_engine_that_does_not_read_for_a_while_gets_all_in_order(pair, served):
    for message in MIXED:
        served.wire.send(message)  # from the loop itself: that this returns is the point
    await asyncio.sleep(0.01)
    assert await asyncio.to_thread(receive_all, pair[1], len(MIXED)) == MIXED


def test_messages_in_one_piece_are_received_one_by_one(pair):
    stream, engine = pair
    stream.sendall(framed(b"launch", b"shut down", b"late")[:-2])
    for message in (b"launch", b"shut down"):
        assert engine.poll(None)
        assert engine.receive() == message
    assert not engine.poll(0)


async def test_large_messages_to_a_server_that_reads(pair, served):
    def work():
        for message in MIXED:
            pair[1].send(message)
        pair[1].finish()

    await asyncio.to_thread(work)
    await served.until(len(MIXED))
    assert served.received == MIXED


def test_a_server_that_is_stuck_does_not_stop_the_engine(pair):
    stream, engine = pair
    for message in MIXED:
        engine.send(message)  # returns though no peer reads
    assert not engine.poll(0)
    frames, received = Frames(), []

    def read():
        while len(received) < len(MIXED):
            received.extend(frames.feed(stream.recv(1 << 16)))

    reader = threading.Thread(target=read)
    reader.start()
    # An engine at rest sends on what is left, without another message.
    while reader.is_alive():
        engine.poll(50)
    assert received == MIXED


@pytest.mark.parametrize("unread", [[], [b"output"], MIXED])
def test_a_server_that_is_gone_is_told_once_all_it_sent_is_read(pair, unread):
    stream, engine = pair
    stream.sendall(framed(b"last words", b"cut short")[:-1])
    for message in unread:
        engine.send(message)
    stream.close()
    assert engine.poll(None)
    assert engine.receive() == b"last words"
    assert engine.poll(None)
    assert engine.receive() is None
    engine.send(b"never read")
    engine.finish()
    assert engine.poll(None)
    assert engine.receive() is None


async def test_an_engine_that_is_gone_is_told_once_all_it_sent_is_taken(pair, served):
    stream = pair[1]._stream
    stream.setblocking(True)
    stream.sendall(framed(b"last words", b"cut short")[:-1])
    stream.close()
    async with asyncio.timeout(5):
        await served.wire.lost.wait()
    assert served.received == [b"last words"]
    served.wire.send(b"never read")


BROKEN = {
    "lost": framed(b"0", b"1", b"2")[:9] + framed(b"0", b"1", b"2")[18:],
    "repeated": framed(b"0") + framed(b"0"),
    "reordered": framed(b"0", b"1")[9:] + framed(b"0"),
}


@pytest.mark.parametrize("stream", BROKEN.values(), ids=BROKEN)
def test_a_lost_or_repeated_message_is_noticed(stream):
    with pytest.raises(LostFrameError, match="came where message"):
        Frames().feed(stream)


def test_an_engine_whose_link_is_broken_fails(pair):
    stream, engine = pair
    stream.sendall(BROKEN["lost"])
    with pytest.raises(LostFrameError, match="message 2 came where message 1 was due"):
        engine.poll(1000)


async def test_a_server_closes_a_broken_link(pair, served, caplog):
    pair[1]._stream.sendall(BROKEN["lost"])
    async with asyncio.timeout(5):
        await served.wire.lost.wait()
    assert served.received == []
    assert "message 2 came where message 1 was due" in caplog.text
    assert pair[1].poll(1000)
    assert pair[1].receive() is None
