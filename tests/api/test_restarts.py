"""The server process when its engine dies, hangs or does not start again."""

import asyncio

import grpc
import pytest
from grpc import aio

from server.engine.ipc.output import EngineDeadError
from server.errors import RefusedError
from tests.api.conftest import ask, until
from tests.api.life import NOT_SERVING, SERVING, Life, SlowEngine

pytestmark = pytest.mark.usefixtures("slow_engines")


def restarts(life):
    """The metric, by reason."""
    value = life.server._metrics.registry.get_sample_value
    labels = {"model_name": "fake"}
    return {
        reason: value("longspan_engine_restarts_total", {**labels, "reason": reason})
        for reason in ("died", "hung", "not_ready")
    }


async def test_an_engines_death_ends_the_server(caplog):
    async with Life() as life:
        engine = await life.engine()
        stream = life.endless()
        await anext(stream)
        engine.die("the engine process was killed by signal 9")
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(life.task, 30) == 1
        assert "signal 9" in caplog.text


async def test_an_engine_is_started_again_if_configured():
    async with Life(on_engine_failure="restart") as life:
        engine = await life.engine()
        await life.stub.Generate(ask())
        engine.die("the engine process was killed by signal 9")
        await until(lambda: life.server.state.phase == "dead")
        assert await life.health() == NOT_SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await life.stub.Generate(ask())
        assert "signal 9" in caught.value.details()
        await life.engine(1)
        assert await life.health() == SERVING
        assert (await life.stub.Generate(ask())).completions[0].text == "abcde"


async def test_an_engine_that_fails_again_and_again_is_given_up(caplog):
    settings = {"restart_limit": 2, "restart_backoff_seconds": 0.05, "restart_window_seconds": 60}
    async with Life(on_engine_failure="restart", **settings) as life:
        for number in range(3):
            engine = await life.engine(number)
            await until(lambda: life.server.state.phase == "ready")
            engine.hung = number == 2
            engine.die(f"reason {number}")
        assert await asyncio.wait_for(life.task, 30) == 1
    assert [made.state for made in SlowEngine.made] == ["stopped"] * 3
    assert "the engine failed (reason 0) and is started again now" in caplog.text
    assert "the engine failed (reason 1) and is started again in 0.05 s" in caplog.text
    sentence = "the engine failed 3 times within 60 s of serving, the last time with this reason: reason 2; "
    assert sentence + "it is not started again (--restart-limit, --restart-window-seconds)" in caplog.text
    assert restarts(life) == {"died": 2, "hung": 0, "not_ready": 0}


@pytest.mark.parametrize(
    "error", [EngineDeadError("it ended"), RefusedError("no memory"), OSError("no process")]
)
async def test_an_engine_that_does_not_start_again_is_tried_again(error, monkeypatch):
    start = SlowEngine.start

    async def fail_once(self):
        if len(self.made) == 1:
            self.made.append(self)
            raise error
        await start(self)

    monkeypatch.setattr(SlowEngine, "start", fail_once)
    async with Life(on_engine_failure="restart", restart_backoff_seconds=0.01) as life:
        engine = await life.engine()
        engine.hung = True
        engine.die("it hangs")
        await until(lambda: life.server.state.failure == str(error))
        await life.engine(2)
        await until(lambda: life.server.state.phase == "ready")
        assert await life.health() == SERVING
        assert restarts(life) == {"died": 0, "hung": 1, "not_ready": 1}
        assert (await life.stub.Generate(ask())).completions[0].text == "abcde"


async def test_no_engine_is_started_for_a_server_that_ends():
    async with Life(on_engine_failure="restart") as life:
        engine = await life.engine()
        stream = life.endless()
        await anext(stream)
        life.server.stop()
        engine.die("the engine process was killed by signal 9")
        assert await asyncio.wait_for(life.task, 30) == 0
        assert len(SlowEngine.made) == 1
