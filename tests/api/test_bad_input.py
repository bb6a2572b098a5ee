"""What is refused, with which status, and which details programs get."""

import asyncio
import math

import grpc
import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from longspan.v1 import inference_pb2
from server.api import errors
from server.api.checks import check_token_ids
from tests.api.conftest import INVALID, ask, call_raw, details, until

NAN = math.nan


def violated(error):
    return [violation.field for violation in details(error)["BadRequest"].field_violations]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": None}, "prompt"),
        ({"text": ""}, "text"),
        ({"text": None, "token_ids": {}}, "token_ids.ids"),
        ({"text": None, "token_ids": {"ids": [1, 300]}}, "token_ids.ids[1]"),
        ({"text": None, "token_ids": {"ids": [2**32 - 1]}}, "token_ids.ids[0]"),
        ({"text": None, "chat": {}}, "chat.messages"),
        ({"text": None, "chat": {"messages": [{"content": "hi"}]}}, "chat.messages[0].role"),
        ({"text": None, "chat": {"messages": [{"role": "wizard"}]}}, "chat.messages[0]"),
        ({"text": None, "chat": {"messages": [{"role": "user", "content": "refuse"}]}}, "chat.messages"),
        ({"text": None, "token_ids": {"ids": [1]}, "special_tokens_as_text": True}, "special_tokens_as_text"),
        ({"text": "\U0010fffd", "special_tokens_as_text": True}, "text"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "é\n"}, "request_id"),
        ({"logprobs": {"output": 6}}, "logprobs.output"),
        ({"logprobs": {"prompt": 6}}, "logprobs.prompt"),
        ({"stop": {"max_tokens": 0}}, "stop.max_tokens"),
        ({"stop": {"max_tokens": 2, "min_tokens": 3}}, "stop.min_tokens"),
        ({"stop": {"stop_strings": ["a", ""]}}, "stop.stop_strings[1]"),
        ({"stop": {"stop_strings": list("abcd")}}, "stop.stop_strings"),
        ({"stop": {"stop_token_ids": [300]}}, "stop.stop_token_ids[0]"),
        ({"stop": {"stop_token_ids": [1] * 257}}, "stop.stop_token_ids"),
        ({"forced_token_ids": [7, 300]}, "forced_token_ids[1]"),
        ({"forced_token_ids": [7] * 6}, "forced_token_ids"),
        ({"forced_token_ids": [7] * 196, "stop": {}}, "forced_token_ids"),
        ({"text": "é" * 140_000}, "text"),
        ({"text": None, "chat": {"messages": [{"role": "user", "content": "x" * 270_000}]}}, "chat.messages"),
        ({"text": None, "chat": {"messages": [{"role": "user"}] * 201}}, "chat.messages"),
        ({"stop": {"stop_strings": [""] * 300}}, "stop.stop_strings"),
        ({"stop": {"stop_strings": ["é" * 513]}}, "stop.stop_strings[0]"),
        ({"forced_token_ids": [300] * 200}, "forced_token_ids"),
        ({"sampling": {"logit_bias": dict.fromkeys(range(1025), 999.0)}}, "sampling.logit_bias"),
        ({"text": None, "chat": {"messages": [{}] * 10_000}}, "chat.messages"),
        ({"text": None, "chat": {"messages": [{}] * 40_000}}, "request"),
        ({"sampling": {"logit_bias": dict.fromkeys(range(2000), 1.0)}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {300: 1.0}}}, "sampling.logit_bias[300]"),
        ({"sampling": {"logit_bias": {7: 100.5}}}, "sampling.logit_bias[7]"),
        ({"sampling": {"logit_bias": {7: NAN}}}, "sampling.logit_bias[7]"),
        *(
            ({"sampling": {name: value}}, f"sampling.{name}")
            for name, values in {
                "temperature": (-0.1, NAN, math.inf, -math.inf),
                "top_p": (0, -1, 1.1, NAN, math.inf),
                "min_p": (-0.1, 1.1, NAN, math.inf),
                "repetition_penalty": (0, -1, 1e-30, 101, NAN, math.inf),
                "presence_penalty": (-2.1, 2.1, NAN, math.inf),
                "frequency_penalty": (-2.1, 2.1, NAN, -math.inf),
            }.items()
            for value in values
        ),
    ],
)
async def test_a_bad_field_is_named(running, fields, field):
    error = await running.refused(ask(**fields) if "text" in fields else ask("hello", **fields))
    assert error.code() is INVALID
    assert violated(error) == [field]
    assert field in error.details()


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": {"temperature": 0, "top_p": 1, "min_p": 0, "presence_penalty": -2, "seed": 2**64 - 1}},
        {"sampling": {"temperature": 1e-45, "top_p": 1e-45, "frequency_penalty": 2, "top_k": 2**32 - 1}},
        {"sampling": {"logit_bias": {0: -100, 299: 100}}},
        {"n": 4, "sampling": {"temperature": 0}},
        {"priority": -(2**31)},
        {"forced_token_ids": [0, 299, 256, 7, 7]},
        {"forced_token_ids": [7] * 195, "stop": {}},
        {"logprobs": {"output": 5, "prompt": 5}},
        {"stop": {"stop_strings": ["a", "b", "c"], "max_tokens": 1, "min_tokens": 1}},
        {"request_id": "x" * 128},
    ],
)
async def test_the_edges_of_the_ranges_are_accepted(running, fields):
    answer = await running.generate(**fields)
    assert answer.completions


async def test_all_fields_at_fault_are_reported_together(running):
    error = await running.refused(
        ask(
            "",
            n=9,
            sampling={"temperature": -1, "top_p": 0},
            stop={"stop_strings": [""], "max_tokens": 0},
            logprobs={"output": 99},
        )
    )
    assert violated(error) == [
        *("text", "sampling.temperature", "sampling.top_p", "stop.max_tokens", "stop.stop_strings[0]"),
        *("logprobs.output", "n"),
    ]


async def test_forced_tokens_without_room_are_told_how_much_there_is(running):
    many = await running.refused(ask(forced_token_ids=[7] * 6))
    assert "has 6 ids, more than max_tokens, 5" in many.details()
    for fields in ({"text": "x" * 190}, {"text": None, "token_ids": {"ids": [1] * 190}}):
        error = await running.refused(ask(forced_token_ids=[7] * 11, stop={"max_tokens": 100}, **fields))
        room = "has 11 ids; after a prompt of 190 tokens the context of 200 has room for 10"
        assert error.code() is INVALID
        assert room in error.details()
    # A field at fault is told first, and before anything is tokenized.
    both = await running.refused(ask(forced_token_ids=[300] * 6, n=9))
    assert violated(both) == [*(f"forced_token_ids[{i}]" for i in range(6)), "forced_token_ids", "n"]


async def test_text_whose_tokens_the_model_does_not_know(running, monkeypatch):
    monkeypatch.setattr(running.state.served.ready, "vocabulary_size", 10)
    error = await running.refused(ask("hello"))
    assert error.code() is INVALID
    assert violated(error) == ["text"]
    assert not running.engine.submitted


async def test_thousands_of_faults_and_long_names_still_fit_a_status(running):
    many = await running.refused(ask(None, token_ids={"ids": [10**6] * 199}))
    assert many.code() is INVALID
    assert len(violated(many)) == 16
    assert many.details().endswith("; and at least 13 more")
    for text in ("é" * 5000, "\n" * 5000):
        assert (await running.refused(ask(request_id=text))).code() is INVALID
        assert (await running.refused(ask(model=text))).code() is grpc.StatusCode.NOT_FOUND


async def test_a_prompt_that_is_too_long(running):
    for fields in ({"text": "x" * 200}, {"text": None, "token_ids": {"ids": [1] * 200}}):
        error = await running.refused(ask(**fields))
        assert error.code() is INVALID
        info = details(error)["ErrorInfo"]
        assert (info.reason, info.domain) == ("PROMPT_TOO_LONG", "longspan")
        assert dict(info.metadata) == {"limit": "199", "actual": "200"}
    answer = await running.generate("x" * 199)
    assert answer.usage.completion_tokens == 1


async def test_an_unknown_model(running):
    error = await running.refused(ask(model="gpt-9"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    resource = details(error)["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("model", "gpt-9")
    assert "fake" in error.details()
    for call, request in (
        (running.stub.Tokenize, inference_pb2.TokenizeRequest(model="gpt-9", text="x")),
        (running.stub.GetModelInfo, inference_pb2.GetModelInfoRequest(model="gpt-9")),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await call(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_chat_without_a_template(running, monkeypatch):
    monkeypatch.setattr(running.state.served.tokenizer, "has_chat_template", False)
    monkeypatch.setattr(running.state.served.tokenizer, "chat_refusal", "has a broken chat template")
    error = await running.refused(ask(None, chat={"messages": [{"role": "user", "content": "hi"}]}))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)["ErrorInfo"].reason == "NO_CHAT_TEMPLATE"
    assert error.details() == (
        "the model 'fake' has a broken chat template; send the prompt as text or token ids"
    )


async def test_a_full_queue(running):
    running.engine.open.clear()
    calls = [running.stub.Generate(ask(n=4)) for _ in range(2)]
    await until(lambda: running.engine.running == 8)
    with pytest.raises(aio.AioRpcError) as caught:
        await running.generate()
    error = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info = details(error)
    assert info["ErrorInfo"].reason == "QUEUE_FULL"
    assert 0 < info["RetryInfo"].retry_delay.ToTimedelta().total_seconds() <= 60
    assert running.sample("longspan_request_rejections_total", reason="queue_full") == 1
    running.engine.open.set()
    await asyncio.gather(*calls)
    await running.generate()


async def test_a_name_in_use(running):
    running.engine.open.clear()
    first = running.stub.Generate(ask(request_id="mine"))
    await until(lambda: running.engine.running == 1)
    with pytest.raises(aio.AioRpcError) as caught:
        await running.generate(request_id="mine")
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert "mine" in caught.value.details()
    running.engine.open.set()
    await first
    await running.generate(request_id="mine")


async def test_while_loading_draining_and_dead(loading):
    loading.state.progress = "loading weights, 40%"
    for phase, word in (("loading", "loading weights, 40%"), ("draining", "shutting down"), ("dead", "boom")):
        loading.state.phase, loading.state.failure = phase, "boom"
        error = await loading.refused(ask())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert word in error.details()
        assert details(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
        for call, request in (
            (loading.stub.ListModels, inference_pb2.ListModelsRequest()),
            (loading.stub.CountTokens, inference_pb2.CountTokensRequest(text="x")),
        ):
            with pytest.raises(aio.AioRpcError) as caught:
                await call(request)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await loading.stub.GetServerInfo(inference_pb2.GetServerInfoRequest())).version


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Generate", "GenerateRequest"),
        ("Tokenize", "TokenizeRequest"),
        ("StreamGenerate", "StreamGenerateRequest"),
    ],
)
async def test_bytes_that_are_no_message(running, method, message):
    # field 1 (model, or the request) of 4 bytes that are not UTF-8, or cut off after its length
    for payload in (b"\x0a\x04\xff\xfe\xff\xfe", b"\x0a\x7f"):
        error = await call_raw(running, method, payload)
        assert error.code() is INVALID
        assert message in error.details()
        assert details(error)["ErrorInfo"].reason == "MALFORMED_REQUEST"


async def test_a_chat_role_that_is_not_utf8(running):
    request = ask(None, chat={"messages": [{"role": "ROLE", "content": "hi"}]}).SerializeToString()
    error = await call_raw(running, "Generate", request.replace(b"ROLE", b"\xc3\x28\xa0\xff"))
    assert error.code() is INVALID
    assert "UTF-8" in error.details()
    assert not running.engine.submitted


async def test_inputs_of_the_other_methods(running):
    for call, request, field in (
        (running.stub.Tokenize, inference_pb2.TokenizeRequest(), "input"),
        (running.stub.Tokenize, inference_pb2.TokenizeRequest(chat={}), "chat.messages"),
        (running.stub.CountTokens, inference_pb2.CountTokensRequest(), "input"),
        (running.stub.Detokenize, inference_pb2.DetokenizeRequest(token_ids=[0, 300]), "token_ids[1]"),
        (running.stub.Detokenize, inference_pb2.DetokenizeRequest(token_ids=[0] * 201), "token_ids"),
        (running.stub.Tokenize, inference_pb2.TokenizeRequest(text="x" * (1 << 18 | 1)), "text"),
        (running.stub.CountTokens, inference_pb2.CountTokensRequest(text="x" * (1 << 18 | 1)), "text"),
        (running.stub.Abort, inference_pb2.AbortRequest(), "request_id"),
    ):
        with pytest.raises(aio.AioRpcError) as caught:
            await call(request)
        assert caught.value.code() is INVALID
        assert violated(caught.value) == [field]


@given(st.lists(st.integers(0, 2**32 - 1)), st.integers(1, 2**31))
def test_token_ids_are_checked_exactly(ids, vocabulary):
    found = list(check_token_ids("ids", ids, vocabulary))
    assert len(found) == sum(id_ >= vocabulary for id_ in ids)


@given(st.text(max_size=300), st.text(max_size=300))
def test_any_text_of_a_user_fits_a_status(model, request_id):
    for error in (errors.unknown_model(model, "served"), errors.request_id_in_use(request_id)):
        status = error.status()
        size = sum(len(key) + len(value) for key, value in status.trailing_metadata)
        assert size + len(status.details) < 4096
        assert status.details.isascii()
