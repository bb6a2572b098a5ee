"""Longer trials of real servers: overload, and a replica that dies."""

import asyncio
import time

import psutil
import pytest

from longspan import AsyncClient, UnavailableError
from tests.e2e.overload import REFUSED_SECONDS, overloaded
from tests.e2e.server import Server
from tests.models_zoo import save_tiny
from tests.processes import wait_until
from tests.soak.bounds import p99

pytestmark = [pytest.mark.stress, pytest.mark.timeout(600)]

ASK = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
WHOLE = ASK | {"max_tokens": 400}
SECONDS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return "--model", save_tiny("llama", tmp_path_factory.mktemp("llama"))


async def test_three_times_as_many_as_it_takes(model):
    """The queue stays bounded, refusals come at once, and all that is taken is answered as without load."""
    with Server(*model, "--max-running", "4", "--max-queue", "4") as server:
        found = await overloaded(server, places=8, seconds=SECONDS)
        print(found)
        assert len(found.answers) > 100
        assert len(found.refused) > 100
        assert p99(found.own) <= REFUSED_SECONDS, found
        server.wait_idle()


async def test_of_two_replicas_one_that_dies_takes_its_own_streams_only(model):
    with Server(*model) as one, Server(*model) as other:
        both = f"ipv4:{one.host}:{one.port},{other.host}:{other.port}"
        async with other.aclient() as client:
            expected = (await client.generate("hello", **ASK)).token_ids
        async with AsyncClient(both, 0) as client:
            ends, begun = [], asyncio.Event()

            async def stream():
                try:
                    async with client.stream("hello", **WHOLE) as deltas:
                        tokens = []
                        async for delta in deltas:
                            tokens += delta.token_ids
                            begun.set()
                    ends.append(len(tokens))
                except UnavailableError:
                    ends.append(time.monotonic())

            streams = [asyncio.create_task(stream()) for _ in range(8)]
            await begun.wait()
            wait_until(lambda: one.metrics()["longspan_requests_running"] > 0)
            for process in psutil.Process(one.process.pid).children():
                process.kill()
            one.process.kill()
            killed = time.monotonic()
            for _ in range(20):
                assert (await client.generate("hello", **ASK)).token_ids == expected
            await asyncio.gather(*streams)
        whole = [end for end in ends if isinstance(end, int)]
        lost = [end - killed for end in ends if not isinstance(end, int)]
        assert len(whole) + len(lost) == 8
        assert set(whole) == {WHOLE["max_tokens"]}
        assert lost, "it had streams"
        assert max(lost) < 5
