"""The server's life: loading, ready, the engine's death, draining; with the fake engine."""

import asyncio
import json
import os
import re
import signal
import time
import urllib.request
from types import SimpleNamespace

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

import server.app as app
from longspan.v1 import inference_pb2, inference_pb2_grpc
from server import closing
from server.access.granted import granted
from server.api.health import READINESS
from server.engine.ipc import link, spawn
from server.engine.ipc.output import EngineDeadError
from server.engine.ipc.spare import Spare
from server.errors import RefusedError
from server.messages import Loading
from server.models.resolve import ModelFiles
from server.settings import Settings
from tests.api.conftest import END, ask, save_tokenizer, until
from tests.api.fake_engine import FakeEngine

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class SlowEngine(FakeEngine):
    """Loads until it is told to be ready."""

    made: list["SlowEngine"] = []  # noqa: RUF012 (emptied by the fixture)

    async def start(self):
        self.made.append(self)
        self.progress = Loading("loading weights", 0.4)

    async def stop(self):
        if self.state == "loading":
            self.state = "stopped"
        else:
            await super().stop()


class Life:
    """A server that runs in a task, and a client of it."""

    def __init__(self, **settings):
        given = Settings(port=0, metrics_port=0, **settings)
        self.server = app.Server(given, granted(given))
        self.task = asyncio.create_task(self.server.run())

    async def __aenter__(self):
        await until(lambda: self.server.port != 0)
        self.channel = aio.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return self

    async def __aexit__(self, *_):
        await self.channel.close()
        if not self.task.done():
            self.server.end()
        await asyncio.gather(self.task, return_exceptions=True)

    async def health(self):
        answer = await health_pb2_grpc.HealthStub(self.channel).Check(
            health_pb2.HealthCheckRequest(service=READINESS)
        )
        return answer.status

    async def engine(self, number=0):
        """The engine started as number ``number``, ready."""
        await until(lambda: len(SlowEngine.made) > number, seconds=10)
        engine = SlowEngine.made[number]
        engine.start_now()
        engine.step_seconds = 0.005
        await until(lambda: self.server.state.phase in ("ready", "draining"), seconds=10)
        return engine

    def endless(self):
        request = ask(stop={"max_tokens": 190, "ignore_eos": True})
        return aiter(self.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request)))


def restarts(life):
    """The metric, by reason."""
    value = life.server._metrics.registry.get_sample_value
    labels = {"model_name": "fake"}
    return {
        reason: value("longspan_engine_restarts_total", {**labels, "reason": reason})
        for reason in ("died", "hung", "not_ready")
    }


@pytest.fixture(autouse=True)
def _model(monkeypatch, tmp_path):
    folder = save_tokenizer(tmp_path / "model")
    SlowEngine.made = []
    monkeypatch.setattr(Spare, "keep", lambda self: None)  # torch takes seconds, and no engine here needs it
    monkeypatch.setattr(app, "EngineClient", SlowEngine)
    monkeypatch.setattr(app, "resolve_model", lambda *_, **__: ModelFiles(folder, "fake", "nowhere", folder))


async def test_it_answers_while_loading_and_says_when_it_is_ready(capsys):
    async with Life() as life:
        await until(lambda: "40%" in life.server.state.progress, seconds=10)
        with pytest.raises(aio.AioRpcError) as caught:
            await life.stub.Generate(ask())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "loading weights, 40%" in caught.value.details()
        assert await life.health() == NOT_SERVING
        await life.engine()
        assert await life.health() == SERVING
        line = capsys.readouterr().out
        port, metrics_port = life.server.port, life.server.metrics_port
        assert re.fullmatch(
            rf"Longspan is ready: fake on 127\.0\.0\.1:{port} \(full attention, reference kernel\), "
            rf"metrics http://127\.0\.0\.1:{metrics_port}/metrics  ·  try: \S*longspan generate "
            rf'"What is the capital of Japan\?" --chat --port {port}\n',
            line,
        )
        assert (await life.stub.Generate(ask())).model == "fake"
        address = f"http://127.0.0.1:{life.server.metrics_port}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(address, timeout=5).read())
        assert b'longspan_generation_tokens_total{model_name="fake"} 5.0' in page


@pytest.mark.parametrize(("choice", "temperature"), [("auto", 0.5), ("none", 1.0)])
async def test_generation_config_says_what_requests_leave_unset(choice, temperature, tmp_path, caplog):
    file = {"temperature": 0.5, "top_p": "most", "eos_token_id": [-1, 5, 100000, "<end>", None]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(file))
    async with Life(generation_config=choice) as life:
        engine = await life.engine()
        info = await life.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
        assert list(info.eos_token_ids) == [5, END]
        assert (info.default_sampling.temperature, info.default_sampling.top_p) == (temperature, 1.0)
        await life.stub.Generate(ask())
        assert engine.submitted[0].sampling.temperature == temperature
        assert engine.submitted[0].stop_token_ids == [5, END]
    assert "100000 is outside the model's vocabulary" in caplog.text
    assert ("top_p is 'most'" in caplog.text) == (choice == "auto")


async def test_a_chat_template_that_is_asked_for_is_used(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("Mine: {{ messages[0].content }}")
    async with Life(chat_template=str(file)) as life:
        await life.engine()
        request = inference_pb2.TokenizeRequest(chat={"messages": [{"role": "user", "content": "x"}]})
        assert bytes((await life.stub.Tokenize(request)).token_ids) == b"Mine: x"
    async with Life(chat_template="nowhere") as life:
        with pytest.raises(RefusedError, match="--chat-template nowhere is neither the name of"):
            await asyncio.wait_for(life.task, 10)


async def test_running_requests_finish_while_new_ones_are_refused():
    async with Life() as life:
        await life.engine()
        stream = life.endless()
        await anext(stream)
        life.server.stop()
        assert await life.health() == NOT_SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await life.stub.Generate(ask())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in caught.value.details()
        events = [event async for event in stream]
        assert events[-1].finished.usage.completion_tokens == 190
        assert await asyncio.wait_for(life.task, 2) == 0


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
        assert await asyncio.wait_for(life.task, 2) == 0
        assert engine.running == 0


async def test_told_to_end_while_loading_it_ends():
    async with Life() as life:
        await until(lambda: SlowEngine.made, seconds=10)
        life.server.stop()
        assert await asyncio.wait_for(life.task, 2) == 0


@pytest.mark.parametrize("ready", [False, True])
async def test_ctrl_c_gives_130_until_it_is_ready_and_0_from_then_on(ready):
    async with Life() as life:
        await until(lambda: SlowEngine.made, seconds=10)
        if ready:
            await life.engine()
        os.kill(os.getpid(), signal.SIGINT)
        assert await asyncio.wait_for(life.task, 2) == (0 if ready else 130)


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
        assert await asyncio.wait_for(life.task, 3) == 1
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
        assert await asyncio.wait_for(life.task, 5) == 1
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
        assert await asyncio.wait_for(life.task, 3) == 0
        assert len(SlowEngine.made) == 1


async def test_a_terminal_that_closes_has_it_drain():
    async with Life() as life:
        await life.engine()
        stream = life.endless()
        await anext(stream)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: life.server.state.phase == "draining")
        events = [event async for event in stream]
        assert events[-1].finished.usage.completion_tokens == 190
        assert await asyncio.wait_for(life.task, 2) == 0


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
        assert await asyncio.wait_for(life.task, 3) == 0


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


async def test_what_cannot_be_served_is_refused(monkeypatch):
    def refuse(*_, **__):
        raise RefusedError("there is no such model")

    monkeypatch.setattr(app, "resolve_model", refuse)
    given = Settings(port=0, metrics_port=0)
    with pytest.raises(RefusedError, match="no such model"):
        await app.Server(given, granted(given)).run()
    monkeypatch.undo()


async def test_the_server_process_does_without_torch():
    code = "import server.app, server.text.tokenizer, sys; sys.exit('torch' in sys.modules)"
    process = await asyncio.create_subprocess_exec(app.sys.executable, "-c", code)
    assert await process.wait() == 0
