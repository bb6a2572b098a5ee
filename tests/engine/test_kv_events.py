"""Events of the KV cache as a router reads them, by ZMQ."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from server.engine.kv_events import KVEvents
from server.engine.kv_manager import KVManager
from server.engine.kv_publisher import EventBatch, Publisher
from server.engine.sequence import Sequence
from server.errors import RefusedError
from server.kv_messages import AllBlocksCleared, BlockRemoved, BlockStored, name_of
from server.messages import Sampling, Submit

zmq = pytest.importorskip("zmq")

PAGE = 4


class Router:
    """Keeps the index that a router keeps, from the batches that reach it."""

    def __init__(self, address: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"kv@")
        self._socket.connect(address)
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        self.numbers: list[int] = []
        self.cleared = 0

    def read(self, milliseconds: int = 1000) -> None:
        """Takes what comes until nothing has come for so long."""
        while self._socket.poll(milliseconds):
            _, number, batch = self._socket.recv_multipart()
            self.take(int.from_bytes(number, "big"), batch)

    def take(self, number: int, batch: bytes) -> None:
        """Takes a batch."""
        self.numbers.append(number)
        for event in msgspec.msgpack.decode(batch, type=EventBatch).events:
            match event:
                case AllBlocksCleared():
                    self.blocks.clear()
                    self.cleared += 1
                case BlockRemoved(hashes):
                    for name in hashes:
                        if self.numbers[0] == 0 or name in self.blocks:  # else its pages came before this one
                            del self.blocks[name]
                case BlockStored(hashes, parent, tokens, size):
                    assert size == PAGE
                    assert len(tokens) == size * len(hashes)
                    for index, name in enumerate(hashes):
                        assert name not in self.blocks
                        self.blocks[name] = (parent, tuple(tokens[index * size : (index + 1) * size]))
                        parent = name

    def prompt(self, name: int) -> list[int]:
        """All tokens up to a block's end, as far as its parents are known."""
        parent, tokens = self.blocks[name]
        return (self.prompt(parent) if parent in self.blocks else []) + list(tokens)

    def close(self) -> None:
        """Reads no more."""
        self._socket.close(0)


@pytest.fixture
def addresses(tmp_path):
    return f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"


@pytest.fixture
def events(addresses):
    return KVEvents(PAGE, Publisher(*addresses, "kv@here@tiny"))


@pytest.fixture
def router(addresses, events):
    router = Router(addresses[0])
    yield router
    router.close()


def replay(address: str, start: int) -> list[tuple[int, bytes]]:
    """All batches from a number on."""
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.connect(address)
        socket.send_multipart((b"", start.to_bytes(8, "big")))
        got: list[tuple[int, bytes]] = []
        while True:
            assert socket.poll(5000), "no answer"
            _, number, batch = socket.recv_multipart()
            if int.from_bytes(number, "big", signed=True) == -1:
                return got
            got.append((int.from_bytes(number, "big"), batch))


def compute(kv: KVManager, number: int, prompt: list[int], salt: bytes = b"") -> Sequence:
    """A sequence that has been computed and has left its pages in the cache."""
    sequence = Sequence(
        Submit(id=number, prompt=prompt, sampling=Sampling(), max_tokens=4, salt=salt), number
    )
    kv.adopt_prefix(sequence)
    assert kv.extend(sequence, sequence.remaining)
    kv.advance(sequence, sequence.remaining)
    kv.release(sequence)
    return sequence


def test_a_router_knows_exactly_the_pages_that_can_be_found(addresses, events, router):
    rng = random.Random(7)
    kv = KVManager(30, PAGE)
    kv.tell(events)
    prompts = [[rng.randrange(50) for _ in range(rng.randint(4, 40))] for _ in range(12)]
    known: dict[int, list[int]] = {}
    for number in range(200):
        prompt = rng.choice(prompts)[: rng.randint(4, 40)] + [rng.randrange(50) for _ in range(3)]
        sequence = compute(kv, number, prompt, rng.choice([b"", b"alice"]))
        for index, key in enumerate(sequence.page_keys):
            known[name_of(key)] = prompt[: (index + 1) * PAGE]
    router.read()
    assert router.numbers == sorted(set(router.numbers))
    again = Router(addresses[0])
    for number, batch in replay(addresses[1], 0):
        again.take(number, batch)
    again.close()
    assert again.numbers == list(range(len(again.numbers)))
    assert again.cleared == 1
    findable = {name_of(key) for key in kv.pool._page_of}
    assert again.blocks.keys() == findable
    for name in findable:
        prompt = again.prompt(name)
        assert prompt == known[name][-len(prompt) :]


def test_a_replay_begins_where_it_is_asked_to(addresses, events):
    kv = KVManager(30, PAGE)
    kv.tell(events)
    for number in range(5):
        compute(kv, number, [number] * 8)
        while len(replay(addresses[1], 0)) < number + 2:  # each a batch of its own
            pass
    assert [number for number, _ in replay(addresses[1], 3)] == [3, 4, 5]
    assert replay(addresses[1], 99) == []


def test_what_is_no_request_is_passed_over(addresses, events):
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.connect(addresses[1])
        for frames in ((b"",), (b"", b"1"), (b"", b"x" * 8, b"more"), (b"a" * 9000, b"")):
            socket.send_multipart(frames)
        assert not socket.poll(300)
    assert [number for number, _ in replay(addresses[1], 0)] == [0]


def test_an_address_that_is_not_here_is_refused():
    with pytest.raises(RefusedError, match="KV events can't be published at"):
        Publisher("tcp://203.0.113.1:1", "", "kv@a@b")


def test_the_form_is_that_of_vllm():
    batch = EventBatch(1.0, [BlockStored([5], None, [1, 2, 3, 4], 4), BlockRemoved([5]), AllBlocksCleared()])
    decoded: Any = msgspec.msgpack.decode(msgspec.msgpack.encode(batch))
    stored = ["BlockStored", [5], None, [1, 2, 3, 4], 4, None]
    assert decoded == [1.0, [stored, ["BlockRemoved", [5]], ["AllBlocksCleared"]], 0]
