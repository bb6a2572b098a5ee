"""Calls that ask for something else than generation: tokens, counts, the model, the server."""

import dataclasses

import grpc
import msgspec
import pytest
from grpc import aio

from longspan.v1 import encoder_pb2, encoder_pb2_grpc, inference_pb2
from server.messages import Speculation
from tests.api.conftest import END, details


async def test_tokenize_detokenize_count(running):
    stub = running.stub
    tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(text="a b"))
    assert list(tokens.token_ids) == list(b"a b")
    assert list(tokens.tokens) == ["a", "Ġ", "b"]
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert (await stub.CountTokens(inference_pb2.CountTokensRequest(chat=chat))).token_count == 8
    counted = await stub.CountTokens(inference_pb2.CountTokensRequest(text=""))
    assert (counted.token_count, counted.context_length) == (0, 200)
    ids = [*"hé".encode(), END, 290]
    for keep, text in ((False, "hé"), (True, "hé<end>")):
        request = inference_pb2.DetokenizeRequest(token_ids=ids, keep_special_tokens=keep)
        assert (await stub.Detokenize(request)).text == text


async def test_special_tokens_as_text(running):
    stub, chat = running.stub, {"messages": [{"role": "user", "content": "<end>"}]}
    for given, spelled, special in (
        ({"text": "<end>"}, b"<end>", [END]),
        ({"chat": chat}, b"user:<end>\n", [*b"user:", END, *b"\n"]),
    ):
        for as_text, expected in ((False, special), (True, list(spelled))):
            fields = {**given, "special_tokens_as_text": as_text}
            tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(**fields))
            assert list(tokens.token_ids) == expected
            counted = await stub.CountTokens(inference_pb2.CountTokensRequest(**fields))
            assert counted.token_count == len(expected)
            answer = await running.stub.Generate(inference_pb2.GenerateRequest(**fields))
            assert answer.usage.prompt_tokens == len(expected)


async def test_information(running):
    stub = running.stub
    assert list((await stub.ListModels(inference_pb2.ListModelsRequest())).models) == ["fake"]
    model = await stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert (model.name, model.source, model.context_length) == ("fake", "nowhere", 200)
    assert (model.attention.backend, dict(model.attention.options)) == ("full", {"window": "8"})
    assert (model.dtype, model.kv_dtype) == ("float32", "float16")
    assert list(model.eos_token_ids) == [END]
    default = model.default_sampling
    assert (default.temperature, default.top_k, default.top_p) == (0.25, 40, 0.75)
    assert (default.min_p, default.presence_penalty, default.frequency_penalty) == (0, 0, 0)
    assert default.repetition_penalty == 1.5
    assert all(default.HasField(name) for name in ("min_p", "presence_penalty", "frequency_penalty"))
    assert not default.HasField("seed")
    assert model.has_chat_template
    limits = model.limits
    assert limits == running.state.limits
    assert (limits.max_tokens, limits.n, limits.logprobs, limits.stop_strings) == (199, 4, 5, 3)
    server = await stub.GetServerInfo(inference_pb2.GetServerInfoRequest())
    assert {"python", "grpcio", "torch"} <= set(server.versions)
    assert server.settings["max_running"] == "4"
    # As the engine chose, since no setting said.
    assert (server.settings["max_batch_tokens"], server.settings["kv_memory_share"]) == ("512", "0.3")
    assert server.load.pages_total == 1000
    assert server.uptime_seconds >= 0


async def test_the_model_that_drafts_is_named_without_its_place(running):
    info = await running.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert (info.draft_model, info.HasField("speculation")) == ("", False)
    served = running.state.served
    drafting = Speculation("draft", 4, "", {}, "/srv/models/student")
    ready = msgspec.structs.replace(served.ready, speculation=drafting)
    running.state.set_ready(dataclasses.replace(served, ready=ready))
    info = await running.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert (info.draft_model, info.speculation.method) == ("student", "draft")


async def test_a_decoder_does_not_embed(running):
    stub = encoder_pb2_grpc.EncoderServiceStub(running.channel)
    with pytest.raises(aio.AioRpcError, match="answers Generate and StreamGenerate; for Embed ask") as caught:
        await stub.Embed(encoder_pb2.EmbedRequest(texts=["a"]))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(caught.value)["ErrorInfo"].metadata == {"asked": "embed", "tasks": "generate"}
    info = await running.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert (list(info.tasks), info.HasField("encoder")) == ([inference_pb2.TASK_GENERATE], False)
    name = "longspan_request_rejections_total"
    assert running.sample(name, reason="task_not_served") == 1
