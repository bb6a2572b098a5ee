"""Events of the KV cache as a stream of ``VllmEngine``, and the log behind it."""

from __future__ import annotations

import random

import grpc
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2 as common

from server.access.identities import EVERYONE, Identity
from server.api import kv_log
from server.api.errors import ServiceError
from server.api.kv_log import KVLog
from server.kv_messages import BlockRemoved, BlockStored
from server.protocols.vllm_kv_events import check_allowed
from server.settings import Settings
from tests.api.conftest import details, until

PAGE = 2
METHOD = "/vllm.grpc.engine.VllmEngine/SubscribeKvEvents"


class Index:
    """What a gateway knows: blocks, after which number, and how many of a state came before their parents."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        self.last = self.orphans = 0

    def take(self, batch: common.KvEventBatch) -> None:
        """Takes a batch, which must be the next one."""
        assert self.last in (0, batch.sequence_number - 1)
        self.last = batch.sequence_number
        parts = batch.HasField("snapshot")
        for event in batch.events:
            match event.WhichOneof("data"):
                case "cleared":
                    self.blocks.clear()
                case "removed":
                    for name in event.removed.block_hashes:
                        del self.blocks[name]
                case "stored":
                    stored = event.stored
                    before = stored.parent_block_hash if stored.HasField("parent_block_hash") else None
                    self.orphans += parts and before is not None and before not in self.blocks
                    for block in stored.blocks:
                        assert len(block.token_ids) == block.block_size
                        self.blocks[block.block_hash] = before, tuple(block.token_ids)
                        before = block.block_hash


class Cache:
    """Pages come and go, in chains; the log is told."""

    def __init__(self, log: KVLog, seed: int) -> None:
        self._log = log
        self._rng = random.Random(seed)
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        self._gone: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    def step(self) -> None:
        """Stores a chain behind a page, and one that is gone again, and removes some pages."""
        rng = self._rng
        names = [rng.getrandbits(64) - (1 << 63) for _ in range(rng.randint(1, 3))]
        tokens = [rng.randrange(1 << 17) for _ in range(PAGE * len(names))]
        events = [self._store(rng.choice([None, *self.blocks, *self._gone]), names, tokens)]
        if self._gone:
            name, (before, page) = self._gone.popitem()  # its children may have stayed
            events.append(self._store(before, [name], [*page]))
        for name in rng.sample(list(self.blocks), k=min(len(self.blocks), rng.randint(0, 2))):
            self._gone[name] = self.blocks.pop(name)
            events.append(BlockRemoved([unsigned(name)]))
        self._log.add(events)

    def _store(self, before: int | None, names: list[int], tokens: list[int]) -> BlockStored:
        parent = None if before is None else unsigned(before)
        for index, name in enumerate(names):
            self._gone.pop(name, None)
            self.blocks[name] = before, tuple(tokens[index * PAGE : (index + 1) * PAGE])
            before = name
        return BlockStored([*map(unsigned, names)], parent, tokens, PAGE)


def unsigned(name: int) -> int:
    """A name as the engine has it; gRPC's have a sign."""
    return name % (1 << 64)


@pytest.fixture
def settings():
    return Settings(max_running=4, max_queue=4, protocols="vllm", kv_events="grpc")


@pytest.fixture
def log(running):
    return running.state.kv_log


@pytest.fixture
def stub(running):
    return pb_grpc.VllmEngineStub(running.channel)


def subscribe(stub, start: int = 0) -> aio.UnaryStreamCall:
    return stub.SubscribeKvEvents(common.SubscribeKvEventsRequest(start_sequence_number=start))


async def follow(call: aio.UnaryStreamCall, index: Index, last: int) -> Index:
    while index.last < last:
        index.take(await call.read())
    return index


async def test_the_state_and_what_follows(stub, log, monkeypatch):
    monkeypatch.setattr(kv_log, "_SNAPSHOT_TOKENS", 16 * PAGE)
    cache, index = Cache(log, 1), Index()
    for _ in range(60):
        cache.step()
    call = subscribe(stub)
    parts = [await call.read()]
    parts += [await call.read() for _ in range(parts[0].snapshot.count - 1)]
    assert [part.snapshot.index for part in parts] == list(range(len(parts)))
    assert len(parts) == -(-len(cache.blocks) // 16) > 1
    assert {part.snapshot.blocks for part in parts} == {len(cache.blocks)}
    for part in parts:
        index.take(part)
    assert index.orphans == sum(
        before is not None and before not in cache.blocks for before, _ in cache.blocks.values()
    ), "of those whose parents are there none came before these"
    assert index.blocks == cache.blocks
    for _ in range(60):
        cache.step()
    await follow(call, index, log._next - 1)
    assert index.blocks == cache.blocks
    log.clear()
    cache.blocks.clear()
    cache.step()
    assert (await follow(call, index, log._next - 1)).blocks == cache.blocks
    call.cancel()


async def test_a_subscriber_goes_on_where_it_was(stub, log):
    cache, index = Cache(log, 2), Index()
    for _ in range(10):
        cache.step()
    call = subscribe(stub)
    await follow(call, index, log._next - 1)
    call.cancel()
    for _ in range(10):
        cache.step()
    call = subscribe(stub, index.last)
    assert (await call.read()).sequence_number == index.last, (
        "that one included, so that an answer comes at once"
    )
    await follow(call, index, log._next - 1)
    assert index.blocks == cache.blocks
    call.cancel()
    call = subscribe(stub, log._next)
    cache.step()
    assert (await follow(call, index, log._next - 1)).blocks == cache.blocks
    call.cancel()


@pytest.mark.parametrize("ahead", [1, -30_000_000])
async def test_a_number_that_is_not_kept_is_refused_by_headers_alone(stub, log, ahead):
    """One that was never given, and one of a server that started half a minute before this one."""
    call = subscribe(stub, log._next + ahead)
    with pytest.raises(
        aio.AioRpcError, match="is not kept, or of a server before this one; begin with 0"
    ) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert details(caught.value)["ErrorInfo"].reason == "KV_EVENTS_NOT_KEPT"
    assert "x-request-id" not in dict(await call.initial_metadata())


async def test_one_that_is_too_slow_is_ended(running, stub):
    log = running.state.kv_log = KVLog(kept=4)
    call = subscribe(stub)
    await call.read()
    for _ in range(10):
        log.add([BlockRemoved([1])])
    with pytest.raises(aio.AioRpcError, match="read faster, and begin with number 0") as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS


async def test_it_ends_with_its_client(running, stub):
    opened = running.server._interceptor._open._open
    call = subscribe(stub)
    await call.read()
    assert opened[METHOD] == 1
    call.cancel()
    await until(lambda: not opened[METHOD])


async def test_a_server_that_loads_has_none_yet(loading):
    call = subscribe(pb_grpc.VllmEngineStub(loading.channel))
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_an_identity_needs_to_be_allowed():
    check_allowed(EVERYONE)
    check_allowed(Identity("router", kv_events=True))
    with pytest.raises(ServiceError, match="kv_events = true in --identities") as caught:
        check_allowed(Identity("alice"))
    assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
