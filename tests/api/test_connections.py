"""Bounds of connections, streams and calls of the gRPC service, and their ends."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.access.callers import Callers
from server.api import listen as listening
from server.api import open_calls
from server.api.health import HealthServicer
from server.api.listen import Listener, Parts
from server.api.service import InferenceServicer
from server.api.state import ServerState
from server.observe.metrics import GrpcMetrics, Metrics
from server.settings import Settings
from tests.api.conftest import details
from tests.e2e import http2

CHECK, WATCH = b"/grpc.health.v1.Health/Check", b"/grpc.health.v1.Health/Watch"


@asynccontextmanager
async def serving(**settings):
    """The port of a server without a model."""
    state, metrics = ServerState(Settings(**settings)), Metrics()
    parts = Parts(
        host="127.0.0.1",
        port=0,
        state=state,
        service=InferenceServicer(state, metrics),
        health=HealthServicer(),
        metrics=GrpcMetrics(metrics.registry),
        callers=Callers(),
    )
    server = Listener(parts)
    await server.start()
    yield server.port
    await server.stop(0)


def connect(port: int) -> aio.Channel:
    """A connection of its own."""
    return aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])


def check(channel: aio.Channel):
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


def watch(channel: aio.Channel):
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)


async def refusal(call) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value


async def raw(port: int, *parts: bytes, seconds: float = 0.5) -> list[http2.Frame]:
    sent = asyncio.to_thread(http2.send, ("127.0.0.1", port), *parts, seconds=seconds)
    return http2.frames(await sent)


async def test_connections_beyond_the_bound_are_closed_and_the_others_go_on():
    async with serving(max_connections=3) as port, AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connect(port)) for _ in range(3)]
        for channel in channels:
            await check(channel)
        more = await stack.enter_async_context(connect(port))
        assert (await refusal(check(more))).code() is grpc.StatusCode.UNAVAILABLE
        for channel in channels:
            await check(channel)
        # grpcio 1.83 counts those that have ended, too.
        for _ in range(5):
            await channels.pop().close()
            await asyncio.sleep(0.05)
            channels.append(await stack.enter_async_context(connect(port)))
            await check(channels[-1])


async def test_a_connection_without_calls_or_that_says_nothing_is_closed(monkeypatch):
    short = {"grpc.server_handshake_timeout_ms": 300}
    assert short.keys() <= dict(listening._OPTIONS).keys()
    monkeypatch.setattr(listening, "_OPTIONS", tuple({**dict(listening._OPTIONS), **short}.items()))
    async with serving(connection_idle_seconds=0.3) as port, connect(port) as busy:
        call = watch(busy)
        await call.read()
        for said in ((), (http2.BEGIN,), (http2.BEGIN, http2.call(1, CHECK))):
            begun = time.monotonic()
            await raw(port, *said, seconds=40)
            assert 0.2 < time.monotonic() - begun < 30
        assert not call.done(), "its connection has a call"
        call.cancel()


async def test_a_client_that_is_gone_without_a_word_is_noticed(monkeypatch):
    """It answers no ping, while its kernel takes what is sent, as that of a stopped process does."""
    names = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    short = dict.fromkeys(names, 300)
    assert short.keys() <= dict(listening._OPTIONS).keys()
    monkeypatch.setattr(listening, "_OPTIONS", tuple({**dict(listening._OPTIONS), **short}.items()))
    async with serving() as port, connect(port) as alive:
        call = watch(alive)
        await call.read()
        begun = time.monotonic()
        await raw(port, http2.BEGIN, http2.call(1, WATCH), seconds=40)
        assert 0.2 < time.monotonic() - begun < 30
        await asyncio.sleep(1)
        assert not call.done(), "this one answers"
        call.cancel()


async def test_an_old_connection_takes_no_more_calls_and_ends_after_a_grace():
    async with serving(connection_age_seconds=0.4, connection_grace_seconds=0.6) as port:
        async with connect(port) as channel:
            begun = time.monotonic()
            call = watch(channel)
            await call.read()
            while not call.done():  # by a new connection, from 0.4 s on
                await check(channel)
                await asyncio.sleep(0.01)
            error = await refusal(call.read())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "age" in error.details()
        assert 0.8 < time.monotonic() - begun < 30
    async with serving(connection_age_seconds=0) as port, connect(port) as channel:
        await check(channel)


async def test_streams_beyond_those_of_a_connection_wait_at_the_client():
    async with serving(max_streams_per_connection=4) as port, connect(port) as channel:
        calls = [watch(channel) for _ in range(4)]
        await asyncio.gather(*(call.read() for call in calls))
        checked = asyncio.ensure_future(_checked(channel))
        await asyncio.sleep(0.1)
        assert not checked.done()
        calls.pop().cancel()
        await checked
        begins = b"".join(
            http2.frame(http2.HEADERS, http2.END_HEADERS, stream, http2.call_headers(WATCH))
            for stream in range(1, 12, 2)
        )
        found = await raw(port, http2.BEGIN, begins)
        refused = [each for each in found if each.kind == http2.RST_STREAM]
        assert len(refused) == 2, "of a client that does not heed the bound"


async def _checked(channel):
    return await check(channel)


STAYING = ("/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")


@pytest.mark.parametrize("kind", ["Watch", "ServerReflectionInfo"])
async def test_streams_that_stay_open_are_bounded_per_connection_and_in_all(kind, monkeypatch):
    (name,) = (name for name in STAYING if name.endswith(kind))
    of_one, _ = open_calls.MOST_STAYING[name]
    monkeypatch.setitem(open_calls.MOST_STAYING, name, (of_one, 2 * of_one))

    async def ask():
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        await asyncio.Event().wait()

    def begin(channel):
        if kind == "Watch":
            return watch(channel)
        return reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask(), timeout=20)

    async with serving() as port, connect(port) as first, connect(port) as second, connect(port) as third:
        calls = [begin(channel) for channel in (first, second) for _ in range(of_one)]
        await asyncio.gather(*(call.read() for call in calls))
        for channel, whose in ((first, "this connection has"), (third, "the server has")):
            error = await refusal(begin(channel).read())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert whose in error.details()
            assert kind in error.details()
            assert details(error)["ErrorInfo"].reason == "TOO_MANY_CALLS"
            assert details(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
            await check(channel)
        calls.pop().cancel()
        await asyncio.sleep(0.1)
        last = begin(third)
        assert await last.read()
        for call in (*calls, last):
            call.cancel()


async def test_calls_that_send_no_message_are_bounded_and_health_answers(monkeypatch):
    monkeypatch.setattr(open_calls, "MOST_CALLS", 10)
    method = b"/longspan.v1.InferenceService/GetServerInfo"

    def begin(path: bytes, count: int) -> bytes:
        return b"".join(
            http2.frame(http2.HEADERS, http2.END_HEADERS, 1 + 2 * index, http2.call_headers(path))
            for index in range(count)
        )

    async with serving(max_queue=5) as port, connect(port) as other:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(http2.BEGIN + begin(method, 15))
            await asyncio.sleep(0.3)
            error = await refusal(other.unary_unary(method.decode())(b"", timeout=5))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "15 calls are open" in error.details()
            await check(other)
        await asyncio.sleep(0.3)
        assert await other.unary_unary(method.decode())(b"", timeout=5), "they ended with their connection"


@pytest.mark.parametrize(("size", "taken"), [(15_000, True), (17_000, False)])
async def test_metadata_up_to_16_kib_are_taken(size, taken):
    async with serving() as port, connect(port) as channel:
        for _ in range(4):  # gRPC would refuse some at random between two sizes
            call = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), metadata=(("x", "y" * size),), timeout=5
            )
            if taken:
                await call
            else:
                assert (await refusal(call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_none_of_a_burst_of_calls_is_dropped():
    """gRPC itself ends some with CANCELLED where more than 1000 have not been looked at."""
    async with serving() as port, AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connect(port)) for _ in range(4)]
        for channel in channels:
            await channel.channel_ready()
        calls = [channel.unary_unary("/none/Such")(b"", timeout=20) for channel in channels * 500]
        codes = await asyncio.gather(*(call.code() for call in calls))
    assert set(codes) == {grpc.StatusCode.UNIMPLEMENTED}


async def test_calls_beyond_a_connections_limit_are_held_back_and_answered():
    async with serving(max_streams_per_connection=16) as port, connect(port) as channel:
        calls = [channel.unary_unary("/none/Such")(b"", timeout=20) for _ in range(400)]
        codes = await asyncio.gather(*(call.code() for call in calls))
    assert set(codes) == {grpc.StatusCode.UNIMPLEMENTED}


@pytest.mark.parametrize(
    ("limits", "printed"), [((300, 2000), "1000 1256"), ((300, 300), "44 300"), ((200, 260), "refused 200")]
)
def test_connections_leave_descriptors_for_all_else(limits, printed):
    program = f"""
import resource
from server.descriptors import connections_allowed
from server.errors import RefusedError
resource.setrlimit(resource.RLIMIT_NOFILE, {limits})
try:
    allowed = connections_allowed(1000)
except RefusedError as error:
    assert "ulimit -n 1256" in str(error)
    allowed = "refused"
print(allowed, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == printed
    assert ("--max-connections" in done.stderr) == (printed == "44 300")
