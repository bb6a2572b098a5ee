"""A router follows a real server's cache through requests and the death of its engine."""

from __future__ import annotations

import os
import signal

import pytest

from tests.e2e.server import Server
from tests.e2e.test_lifecycle import restarts
from tests.engine.test_kv_events import Router, replay
from tests.processes import wait_until

pytest.importorskip("zmq")


def test_a_router_sees_prompts_pages_and_a_new_engine(tiny_packed, tmp_path):
    events, again = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    options = (
        "--on-engine-failure",
        "restart",
        "--page-size",
        "4",
        "--kv-events",
        events,
        "--kv-events-replay",
        again,
    )
    with Server(*tiny_packed, *options) as server:
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
        before = router.numbers[-1]
        os.kill(server.engine_pid, signal.SIGKILL)
        with server.client() as client:
            wait_until(lambda: restarts(server, "died") == 1)
            client.wait_until_ready(120)
            router.read(200)
            client.generate("other words " * 4, max_tokens=1)
        # A number that does not go on tells of a new engine, whose batches begin with AllBlocksCleared.
        batches = replay(again, 0)
        assert len(batches) <= before
        router.cleared = 0
        for number, batch in batches:
            router.take(number, batch)
        assert router.cleared == 1
        stored = [router.prompt(name) for name in router.blocks]
        assert stored
        assert not any(tokens == ids[: len(tokens)] for tokens in stored)
        router.close()
