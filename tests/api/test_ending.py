"""The server process ends: drains, is interrupted, or hangs up in time."""

import asyncio
import os
import signal
import time
from types import SimpleNamespace

import grpc
import pytest
from grpc import aio

from server import closing
from server.engine.ipc import link, spawn
from server.settings import Settings
from tests.api.conftest import ask, until
from tests.api.life import NOT_SERVING, SERVING, Life, SlowEngine

pytestmark = pytest.mark.usefixtures("slow_engines")


async def test_running_requests_finish_while_new_ones_are_refused():
    async with Life() as life:
        engine = await life.engine()
        stream = life.endless()
        await anext(stream)
        engine.open.clear()  # until it has been asked, however long that takes
        life.server.stop()
        assert await life.health() == NOT_SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await life.stub.Generate(ask())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in caught.value.details()
        engine.open.set()
        events = [event async for event in stream]
        assert events[-1].finished.usage.completion_tokens == 190
        assert await asyncio.wait_for(life.task, 30) == 0


@pytest.mark.parametrize("twice", [False, True])
async def test_draining_ends(twice):
    async with Life(drain_seconds=30 if twice else 0.2) as life:
        engine = await life.engine()
        stream = life.endless()
        await anext(stream)
        engine.open.clear()
        life.server.stop()
        if twice:
            await asyncio.sleep(0.05)
            life.server.stop()  # as where a terminal closes: the kernel and the shell send SIGHUP
            await asyncio.sleep(0.05)
            assert not life.task.done()
            life.server.end()
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(life.task, 30) == 0
        assert engine.running == 0


async def test_told_to_end_while_loading_it_ends():
    async with Life() as life:
        await until(lambda: SlowEngine.made, seconds=60)
        life.server.stop()
        assert await asyncio.wait_for(life.task, 30) == 0


@pytest.mark.parametrize("ready", [False, True])
async def test_ctrl_c_gives_130_until_it_is_ready_and_0_from_then_on(ready):
    async with Life() as life:
        await until(lambda: SlowEngine.made, seconds=60)
        if ready:
            await life.engine()
        os.kill(os.getpid(), signal.SIGINT)
        assert await asyncio.wait_for(life.task, 30) == (0 if ready else 130)


async def test_a_terminal_that_closes_has_it_drain():
    async with Life() as life:
        await life.engine()
        stream = life.endless()
        await anext(stream)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: life.server.state.phase == "draining")
        events = [event async for event in stream]
        assert events[-1].finished.usage.completion_tokens == 190
        assert await asyncio.wait_for(life.task, 30) == 0


async def test_under_nohup_it_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with Life() as life:
            await life.engine()
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.1)
            assert await life.health() == SERVING
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_it_ends_within_the_time_that_a_pod_gets(monkeypatch):
    """28 of 30 s, also where no collector takes the traces and the engine hangs."""
    parts = (Settings().drain_seconds, closing.LAST_WORDS_SECONDS, closing.CLOSE_SECONDS)
    assert sum(parts) <= 27.5, "the interpreter needs a moment, too"
    assert link._STOP_SECONDS + spawn.KILL_SECONDS <= closing.CLOSE_SECONDS
    async with Life() as life:
        await life.engine()
        life.server._traces = SimpleNamespace(close=lambda: time.sleep(60))
        monkeypatch.setattr(closing, "CLOSE_SECONDS", 0.2)
        life.server.stop()
        assert await asyncio.wait_for(life.task, 30) == 0


async def test_a_part_that_fails_to_end_keeps_no_other_from_ending(caplog):
    ended = []

    class Engine:
        async def stop(self):
            await asyncio.sleep(0.05)
            ended.append("engine")

    def fail():
        raise RuntimeError("no exporter")

    spare = SimpleNamespace(end=lambda: ended.append("spare"))
    await closing.close(None, Engine(), spare, None, SimpleNamespace(close=fail))
    assert sorted(ended) == ["engine", "spare"]
    assert "sending the last traces did not end well" in caplog.text
    assert "no exporter" in caplog.text
