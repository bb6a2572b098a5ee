"""The server process as it starts: what it answers meanwhile, takes and refuses."""

import asyncio
import json
import re
import sys
import urllib.request

import grpc
import psutil
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

import server.app as app
from longspan.v1 import inference_pb2
from server.access.granted import granted
from server.api.health import READINESS
from server.api.listen import Listener
from server.errors import RefusedError
from server.settings import Settings
from tests.api.conftest import END, ask, until
from tests.api.life import NOT_SERVING, SERVING, Life

pytestmark = pytest.mark.usefixtures("slow_engines")


async def test_it_answers_while_loading_and_says_when_it_is_ready(capsys):
    async with Life() as life:
        await until(lambda: "40%" in life.server.state.progress, seconds=60)
        with pytest.raises(aio.AioRpcError) as caught:
            await life.stub.Generate(ask())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "loading weights, 40%" in caught.value.details()
        assert await life.health() == NOT_SERVING
        assert await life.probe("/healthz") == 200
        assert await life.probe("/readyz") == 503
        await life.engine()
        assert await life.health() == SERVING
        assert await life.probe("/readyz") == 200
        line = capsys.readouterr().out
        port, metrics_port = life.server.port, life.server.metrics_port
        assert re.fullmatch(
            rf"Longspan is ready: fake on 127\.0\.0\.1:{port}\n"
            rf"  full attention, reference kernel, metrics http://127\.0\.0\.1:{metrics_port}/metrics\n"
            r"  try: \S*longspan generate "
            rf'"What is the capital of Japan\?" --chat --port {port}\n',
            line,
        )
        assert (await life.stub.Generate(ask())).model == "fake"
        address = f"http://127.0.0.1:{life.server.metrics_port}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(address, timeout=5).read())
        assert b'longspan_generation_tokens_total{model_name="fake"} 5.0' in page


async def test_without_metrics_no_port_of_theirs_is_opened():
    def listening():
        own = psutil.Process().net_connections()
        return {one.laddr.port for one in own if one.status == psutil.CONN_LISTEN}

    before = listening()
    async with Life(metrics=False) as life:
        await life.engine()
        assert listening() - before == {life.server.port}


async def test_grpc_itself_refuses_what_no_request_to_the_model_can_be():
    async with Life() as life:
        asked = health_pb2.HealthCheckRequest(service=READINESS)
        watch = health_pb2_grpc.HealthStub(life.channel).Watch(asked)
        assert (await watch.read()).status == NOT_SERVING
        before = await refusal(life, 1 << 20)
        assert before.code() is grpc.StatusCode.UNAVAILABLE, "it may be tried again when there is a model"
        port = life.server.port
        await life.engine()
        assert life.server.port == port
        assert (await watch.read()).status == SERVING, "the stream goes on"
        limit = life.server.state.limits.request_bytes
        assert (await refusal(life, 2 * limit)).code() is grpc.StatusCode.INVALID_ARGUMENT
        after = await refusal(life, 2 * limit + 1)
        assert after.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"larger than max ({2 * limit + 1} vs. {2 * limit})" in after.details()
        assert (await life.stub.Generate(ask())).model == "fake"


async def test_a_server_that_is_told_to_end_while_it_listens_anew_is_not_called_ready(monkeypatch, capsys):
    async with Life() as life:

        async def renew(*_):
            life.server._interrupt()

        monkeypatch.setattr(Listener, "renew", renew)
        await life.engine()
        assert await life.task == 130
    assert "is ready" not in capsys.readouterr().out


async def test_a_limit_that_is_set_is_grpcs_own_from_the_first(monkeypatch):
    async def renew(*_):
        raise AssertionError

    monkeypatch.setattr(Listener, "renew", renew)
    async with Life(max_request_bytes="32MiB") as life:
        await life.engine()
        assert (await refusal(life, (32 << 20) + 1)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def refusal(life, size):
    """The error with which a message of so many bytes is refused."""
    call = life.channel.unary_unary("/longspan.v1.InferenceService/Generate")
    with pytest.raises(aio.AioRpcError) as caught:
        await call(b"\xff" * size)
    return caught.value


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
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
