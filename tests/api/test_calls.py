"""Calls that end before their time, or break."""

import asyncio
import logging
import os
import signal

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from tokenizers.decoders import Strip

from longspan.v1 import inference_pb2, types_pb2
from server.api import interceptor, stall
from server.messages import FinishReason, SequenceOutput
from server.text import chat as chat_templates
from server.text import template_process
from server.text.template_process import TemplateProcess
from tests.api.conftest import ask, details, until


def stream(running, **fields):
    fields.setdefault("stop", {"max_tokens": 190, "ignore_eos": True})
    return running.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=ask(**fields)))


async def test_a_cancelled_stream_is_aborted_in_the_engine(running):
    running.engine.step_seconds = 0.01
    call = stream(running, n=2)
    await call.read()
    call.cancel()
    await until(lambda: running.engine.running == 0)
    assert sorted(running.engine.aborted) == [submit.id for submit in running.engine.submitted]
    await until(
        lambda: running.sample("longspan_requests_total", finish_reason="none", grpc_code="CANCELLED") == 1
    )


async def test_a_cancelled_unary_call_is_aborted_while_it_waits(running):
    running.engine.open.clear()
    call = running.stub.Generate(ask())
    await until(lambda: running.engine.running == 1)
    call.cancel()
    await until(lambda: running.engine.running == 0)


@pytest.mark.parametrize("unary", [True, False])
async def test_a_deadline_aborts_in_the_engine(running, unary):
    running.engine.step_seconds = 0.01
    request = ask(stop={"max_tokens": 190, "ignore_eos": True})
    ending = running.stub.Generate(request, timeout=0.1) if unary else running.events(request, timeout=0.1)
    with pytest.raises(aio.AioRpcError) as caught:
        await ending
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: running.engine.running == 0)
    labels = {"finish_reason": "none", "grpc_code": "DEADLINE_EXCEEDED"}
    await until(lambda: running.sample("longspan_requests_total", **labels) == 1)


async def test_many_cancellations_leave_nothing_and_log_nothing(running, caplog):
    running.engine.step_seconds = 0.001
    running.state.admission.limit = 1000

    async def one(i):
        call = stream(running)
        for _ in range(i % 7):
            await call.read()
        call.cancel()

    with caplog.at_level(logging.WARNING):
        await asyncio.gather(*(one(i) for i in range(200)))
        await until(lambda: len(running.state.admission) == 0)
    assert running.engine.running == 0
    assert not running.engine._streams
    assert not caplog.records


async def test_a_client_that_has_gone_when_its_answer_comes_leaves_nothing_in_the_log(
    running, monkeypatch, caplog
):
    async def gone(call, context):
        raise aio.InternalError("the message can't be sent")

    monkeypatch.setattr(interceptor._Call, "name", gone)
    for fields in ({}, {"n": 0}):  # an answer, and a refusal
        with pytest.raises(aio.AioRpcError):
            await running.stub.Generate(ask(**fields), timeout=0.5)
    await until(lambda: not len(running.state.admission))
    assert [record for record in caplog.records if record.name.startswith("grpc")] == []


async def test_abort_ends_a_stream_with_what_it_has(running):
    running.engine.step_seconds = 0.005
    call = stream(running, request_id="mine", n=2)
    iterator = aiter(call)
    events = [await anext(iterator) for _ in range(4)]
    answer = await running.stub.Abort(inference_pb2.AbortRequest(request_id="mine"))
    assert answer.found
    events += [event async for event in iterator]
    finished = events[-1].finished
    assert [r.finish_reason for r in finished.results] == [types_pb2.FINISH_REASON_ABORTED] * 2
    given = sum(len(event.delta.token_ids) for event in events)
    assert finished.usage.completion_tokens == given > 0
    assert running.engine.running == 0
    assert not (await running.stub.Abort(inference_pb2.AbortRequest(request_id="mine"))).found


async def test_abort_before_the_first_token(running):
    running.engine.open.clear()
    call = asyncio.ensure_future(running.generate(request_id="mine"))
    await until(lambda: running.engine.running == 1)
    assert (await running.stub.Abort(inference_pb2.AbortRequest(request_id="mine"))).found
    answer = await call
    assert answer.completions[0].result.finish_reason == types_pb2.FINISH_REASON_ABORTED
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 0


async def test_a_dead_engine_ends_every_stream(running):
    running.engine.step_seconds = 0.01
    calls = [aiter(stream(running)) for _ in range(4)]
    for call in calls:
        await anext(call)
    running.engine.die("the engine process was killed by signal 9")
    for call in calls:
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "signal 9" in caught.value.details()
        assert details(caught.value)["ErrorInfo"].reason == "ENGINE_DEAD"
    with pytest.raises(aio.AioRpcError) as caught:
        await running.generate()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_sequence_that_the_engine_cannot_compute_fails_alone(running, monkeypatch):
    advance = running.engine._advance

    def fail_one(id_, now):
        output = advance(id_, now)
        if len(running.engine.submitted) == 2 and running.engine.submitted[-1].id == id_:
            running.engine._work.pop(id_, None)
            return SequenceOutput(id_, [], finish=FinishReason.FAILED)
        return output

    running.engine.step_seconds = 0.005
    good = asyncio.ensure_future(running.generate(stop={"max_tokens": 20}))
    await until(lambda: running.engine.running == 1)
    monkeypatch.setattr(running.engine, "_advance", fail_one)
    with pytest.raises(aio.AioRpcError) as caught:
        await running.generate(request_id="bad")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert (await good).usage.completion_tokens == 20


@pytest.mark.parametrize("texts", [False, True])
async def test_a_bug_gives_the_request_id_and_nothing_else(texts, running, monkeypatch, caplog):
    def broken(*_, **__):
        raise KeyError("a secret of the server")

    settings = running.state.settings.model_copy(update={"log_texts": texts})
    monkeypatch.setattr(running.state, "settings", settings)

    monkeypatch.setattr(running.state.served.tokenizer, "encode", broken)
    for call in (
        running.stub.Generate(ask(request_id="mine")),
        running.stub.Tokenize(inference_pb2.TokenizeRequest(text="x")),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        error = caught.value
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(error)
        found = details(error)
        assert list(found) == ["RequestInfo"]
        assert isinstance(found["RequestInfo"], error_details_pb2.RequestInfo)
        name = found["RequestInfo"].request_id
        assert ("x-request-id", name) in list(error.initial_metadata())
        (told,) = (record for record in caplog.records if name in record.getMessage())
        assert "KeyError" in str(told.exc_info[1]) + told.exc_info[0].__name__
        assert ("secret" in str(told.exc_info[1])) == texts
    assert ("raise KeyError" in caplog.text, "KeyError: 'a secret" in caplog.text) == (True, texts)
    assert running.sample("longspan_requests_total", finish_reason="none", grpc_code="INTERNAL") == 1


async def test_a_panic_of_the_tokenizers_library_is_answered_like_any_bug(running, monkeypatch):
    backend = running.state.served.tokenizer._backend
    # With this one the library has a bug for a text of one ``a``.
    monkeypatch.setattr(backend, "decoder", Strip("a", 3, 3))
    request = inference_pb2.DetokenizeRequest(token_ids=[backend.token_to_id("a")])
    with pytest.raises(aio.AioRpcError) as caught:
        await running.stub.Detokenize(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert list(details(caught.value)) == ["RequestInfo"]


async def test_the_request_id_is_in_the_initial_metadata(running):
    for given in ("mine", ""):
        call = running.stub.Generate(ask(request_id=given))
        metadata = dict(await call.initial_metadata())
        answer = await call
        assert metadata["x-request-id"] == answer.request_id
        assert answer.request_id == (given or answer.request_id) != ""


async def test_a_client_that_does_not_read_is_ended_and_others_go_on(running, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "longspan.requests")
    monkeypatch.setattr(stall, "STALL_SECONDS", 0.3)
    running.engine.step_seconds = 0.001
    # Every token weighs about 400 KiB, so that gRPC's buffers are full after a dozen.
    monkeypatch.setattr(running.state.served.tokenizer, "token_text", lambda token: "x" * 400_000)
    call = aiter(stream(running, logprobs={"output": 0}))
    await anext(call)
    await until(lambda: running.engine.running == 1)
    assert (await running.generate()).completions[0].text == "abcde"
    await until(lambda: len(running.state.admission) == 0)
    assert running.engine.running == 0
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value)["ErrorInfo"].reason == "STREAM_STALLED"
    ended = {"finish_reason": "none", "grpc_code": "RESOURCE_EXHAUSTED"}
    assert running.sample("longspan_requests_total", **ended) == 1
    assert any(": RESOURCE_EXHAUSTED, none; 5 prompt tokens" in text for text in caplog.messages)


async def test_what_came_while_the_client_was_slow_is_merged(running, monkeypatch):
    monkeypatch.setattr(running.state.served.tokenizer, "token_text", lambda token: "x" * 60_000)
    call = aiter(stream(running, logprobs={"output": 0}, stop={"max_tokens": 190, "ignore_eos": True}))
    await anext(call)
    await until(lambda: running.engine.running == 0)
    deltas = [event.delta async for event in call if event.HasField("delta")]
    assert len(deltas) < 150
    assert sum(len(delta.token_ids) for delta in deltas) == 190


async def test_a_stopped_process_of_chat_templates_is_the_servers_fault(running, monkeypatch):
    process = TemplateProcess(seconds=0.5)
    monkeypatch.setattr(template_process, "_SILENT_SECONDS", 0.2)
    monkeypatch.setattr(chat_templates, "template_process", lambda: process)
    request = inference_pb2.CountTokensRequest(chat={"messages": [{"role": "user", "content": "hi"}]})
    try:
        process.render("", [], {})
        os.kill(process._process.pid, signal.SIGSTOP)
        with pytest.raises(aio.AioRpcError) as caught:
            await running.stub.CountTokens(request)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "was lost; try again" in caught.value.details()
        found = details(caught.value)
        assert found["ErrorInfo"].reason == "CHATS_UNAVAILABLE"
        assert found["RetryInfo"].retry_delay.seconds == 3
        assert (await running.stub.CountTokens(request)).token_count == 8
    finally:
        process.close()
