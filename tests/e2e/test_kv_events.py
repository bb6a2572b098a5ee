"""Routers follow a real server's cache, by ZMQ and by gRPC, through requests and the death of its engine."""

from __future__ import annotations

import time

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from tests.api.test_kv_events import Index, unsigned
from tests.e2e.here import serving
from tests.engine.test_kv_events import Router, replay
from tests.processes import wait_until

pytest.importorskip("zmq")


def wait_until_same(index: Index, router: Router, address: str) -> None:
    """Both know the same pages, once the publisher's thread has come to the last ones."""
    told = {
        unsigned(name): (None if before is None else unsigned(before), tokens)
        for name, (before, tokens) in index.blocks.items()
    }
    end = time.monotonic() + 60
    while told != router.blocks:
        assert time.monotonic() < end
        router.blocks.clear()
        for number, batch in replay(address, 0):
            router.take(number, batch)


def test_a_router_sees_prompts_pages_and_a_new_engine(tiny_settings, tmp_path):
    events, again = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    options = {"kv_events": events, "kv_events_replay": again, "protocols": "vllm", "page_size": 4}
    with (
        serving(**tiny_settings, **options, on_engine_failure="restart") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        router = Router(events)
        with server.client() as client:
            prompt = "the same words " * 4
            client.generate(prompt, max_tokens=4, ignore_eos=True)
            ids = list(client.tokenize(prompt).token_ids)
        router.read(500)
        router.blocks.clear()
        for number, batch in replay(again, 0):  # the first ones came before it had subscribed
            router.take(number, batch)
        stored = [router.prompt(name) for name in router.blocks]
        assert max(map(len, stored)) >= len(ids) // 4 * 4
        assert all(tokens[: len(ids)] == ids[: len(tokens)] for tokens in stored)
        asked = common_pb2.SubscribeKvEventsRequest()
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        stream, index = stub.SubscribeKvEvents(asked, timeout=300), Index()
        index.take(next(stream))
        wait_until_same(index, router, again)
        server.lose_engine()
        with server.client() as client:
            wait_until(lambda: server.restarts("died") == 1)
            client.wait_until_ready(120)
            router.read(200)
            client.generate("other words " * 4, max_tokens=1)
        # A number that does not go on tells of a new engine, whose batches begin with AllBlocksCleared.
        batches = replay(again, 0)
        assert batches[0][0] == 0
        router.cleared = 0
        for number, batch in batches:
            router.take(number, batch)
        assert router.cleared == 1
        stored = [router.prompt(name) for name in router.blocks]
        assert stored
        assert not any(tokens == ids[: len(tokens)] for tokens in stored)
        fresh = Index()
        fresh.take(next(stub.SubscribeKvEvents(asked, timeout=60)))
        while index.last < fresh.last:  # numbers go on with a new engine
            index.take(next(stream))
        assert index.blocks == fresh.blocks
        wait_until_same(fresh, router, again)
        router.close()
