"""``VllmEngine`` before the fake engine: every field used or refused, and answers equal to Longspan's own."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import sys
import tracemalloc
import zipfile

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2 as common

from server.api.errors import ServiceError
from server.errors import RefusedError
from server.protocols import vllm
from server.protocols.load import services
from server.protocols.vllm_answer import VllmAnswer
from server.protocols.vllm_request import generate_request
from server.settings import Settings
from tests.api.conftest import INVALID, TEMPLATE, details, until

PROMPT = list(b"hello")
UNCHANGED = {"seed": 0, "temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1}
# Fields that change nothing: the ids count and not the text, and no text is sent back.
WITHOUT_EFFECT = {"tokenized.original_text", "sampling_params.spaces_between_special_tokens"}
# Of the answer, and not of what is asked of the engine; tried below.
OF_THE_ANSWER = {"stream"}
REFUSED = {
    *("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "extra_mm_inputs", "media_refs"),
    "data_parallel_rank",
    *(
        f"sampling_params.{name}"
        for name in (
            *("json_schema", "regex", "grammar", "structural_tag", "json_object", "choice"),
            "grammar_from_first_token",
        )
    ),
}


@pytest.fixture
def settings():
    return Settings(max_running=4, max_queue=4, max_n=4, max_logprobs=5, max_stop_strings=3, protocols="vllm")


@pytest.fixture
def stub(running):
    return pb_grpc.VllmEngineStub(running.channel)


def request(*, stream: bool = False, **sampling) -> pb.GenerateRequest:
    sampling = {"max_tokens": 5, "seed": 0, "skip_special_tokens": True, **sampling}
    return pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=PROMPT), sampling_params=sampling, stream=stream
    )


async def answers(stub, asked: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [answer async for answer in stub.Generate(asked)]


def value_of(field):
    """Some value that the field does not have where it is unset."""
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return {7: 1.5}
    plain = {field.CPPTYPE_STRING: "x", field.CPPTYPE_BOOL: True, field.CPPTYPE_FLOAT: 0.5}
    one = plain.get(field.cpp_type, 3) if kind is None else GetMessageClass(kind)()
    return [one] if field.is_repeated else one


PARENTS = ("tokenized", "sampling_params")
FIELDS = [
    *((None, field) for field in pb.GenerateRequest.DESCRIPTOR.fields if field.name not in PARENTS),
    *(("sampling_params", field) for field in pb.SamplingParams.DESCRIPTOR.fields),
    *(("tokenized", field) for field in pb.TokenizedInput.DESCRIPTOR.fields),
]


@pytest.mark.parametrize(("parent", "field"), FIELDS, ids=lambda one: getattr(one, "name", one))
def test_every_field_is_used_or_refused_by_name(parent, field):
    path = field.name if parent is None else f"{parent}.{field.name}"
    plain, changed = (request(skip_special_tokens=False) for _ in range(2))
    message = changed if parent is None else getattr(changed, parent)
    if field.name == "input_ids":
        message.input_ids.append(3)
    else:
        message.MergeFrom(type(message)(**{field.name: value_of(field)}))
    assert changed != plain
    if path in REFUSED:
        with pytest.raises(ServiceError, match=rf"^{path}: ") as caught:
            generate_request(changed, 100)
        assert caught.value.code is INVALID
    else:
        same = generate_request(changed, 100) == generate_request(plain, 100)
        assert same == (path in WITHOUT_EFFECT | OF_THE_ANSWER)


@pytest.mark.parametrize("n", [1, 3])
async def test_tokens_are_those_of_the_own_service(running, stub, n):
    own = await running.generate(n=n, sampling=UNCHANGED)
    complete = [answer.complete for answer in await answers(stub, request(n=n))]
    assert [list(one.output_ids) for one in complete] == [list(one.token_ids) for one in own.completions]
    assert [one.finish_reason for one in complete] == ["length"] * n
    assert {one.prompt_tokens for one in complete} == {len(PROMPT)}
    streamed = await answers(stub, request(n=n, stream=True))
    chunks = [answer.chunk for answer in streamed if answer.HasField("chunk")]
    assert len(chunks) > n
    for one in complete:
        parts = [token for chunk in chunks if chunk.index == one.index for token in chunk.token_ids]
        assert parts == list(one.output_ids)
    first, second = running.engine.submitted[0], running.engine.submitted[n]
    assert (first.sampling, first.stop_token_ids) == (second.sampling, second.stop_token_ids)


async def test_unset_fields_take_the_defaults_of_the_protocol(running, stub):
    """Not the model's, which are 0.25, 40, 0.75 and 1.5 here; the gateway learns those from GetModelInfo."""
    await answers(stub, pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(max_tokens=1)))
    sampling = running.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (1, 0, 1, 1)
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    assert json.loads(info.default_sampling_params_json)["temperature"] == 0.25


async def test_what_ended_a_sample(running, stub):
    (end,) = await answers(stub, request(max_tokens=20, stop_token_ids=[ord("c")]))
    assert (end.complete.finish_reason, end.complete.matched_token_id) == ("stop", ord("c"))
    (end,) = await answers(stub, request(max_tokens=20, stop=["de"]))
    assert (end.complete.finish_reason, end.complete.matched_stop_str) == ("stop", "de")


async def test_log_probabilities(running, stub):
    asked = {"max_tokens": 2, "logprobs": 2, "prompt_logprobs": 1}
    (end,) = await answers(stub, request(**asked))
    output, given = end.complete.output_logprobs, end.complete.input_logprobs
    assert list(output.token_logprobs) == [-0.5, -1.5]
    assert [list(top.values) for top in output.top_logprobs] == [[-1, -2], [-1, -2]]
    assert [one.HasField("value") for one in given.token_logprobs] == [False, True, True, True, True]
    assert given.token_ids[0] == PROMPT[0]
    *chunks, last = await answers(stub, request(**asked, stream=True))
    assert chunks[0].chunk.input_logprobs == given
    assert not any(chunk.chunk.HasField("input_logprobs") for chunk in chunks[1:])
    parts = [value for chunk in chunks for value in chunk.chunk.output_logprobs.token_logprobs]
    assert parts == list(output.token_logprobs)
    assert not last.complete.HasField("output_logprobs"), "a long answer would be sent twice"


async def test_the_end_of_a_prompt_that_is_cut(running, stub):
    await answers(stub, request(truncate_prompt_tokens=2))
    assert running.engine.submitted[0].prompt == PROMPT[-2:]


async def test_a_wrong_value_is_refused_like_any_other(running, stub):
    with pytest.raises(aio.AioRpcError, match="temperature") as caught:
        await answers(stub, request(temperature=-1))
    assert caught.value.code() is INVALID
    assert not running.engine.submitted


@pytest.mark.parametrize("how", ["abort", "leave"])
async def test_a_request_ends_early(running, stub, how):
    running.engine.step_seconds = 0.01
    asked = request(max_tokens=100, stream=True)
    asked.request_id = "mine"
    call = stub.Generate(asked)
    messages = aiter(call)
    assert (await anext(messages)).chunk.token_ids
    if how == "abort":
        await stub.Abort(pb.AbortRequest(request_ids=["other", "mine"]))
        last = [answer async for answer in messages][-1]
        assert last.complete.finish_reason == "abort"
    else:
        call.cancel()
    await until(lambda: running.engine.running == 0)
    running.engine.step_seconds = 0
    sample = {"finish_reason": "aborted" if how == "abort" else "none"}
    code = "OK" if how == "abort" else "CANCELLED"
    await until(lambda: running.sample("longspan_requests_total", grpc_code=code, **sample) == 1)


async def test_a_server_that_loads_is_not_there_yet(loading):
    stub = pb_grpc.VllmEngineStub(loading.channel)
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.HealthCheck(pb.HealthCheckRequest())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_health_without_an_engine(running, stub):
    assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
    running.state.phase, running.state.failure = "dead", "it was killed"
    answer = await stub.HealthCheck(pb.HealthCheckRequest())
    assert (answer.healthy, "it was killed" in answer.message) == (False, True)
    running.state.phase = "ready"


async def test_the_tokenizer_and_its_template(running, stub):
    chunks = [chunk async for chunk in stub.GetTokenizer(common.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {"tokenizer.json", "tokenizer_config.json"} < set(archive.namelist())
        assert archive.read("chat_template.jinja").decode() == TEMPLATE


async def test_the_tokenizer_is_packed_once_for_all_who_ask(running, stub, monkeypatch):
    made = []
    monkeypatch.setattr(vllm, "bundle", lambda _: made.append(1) or b"archive")

    async def ask():
        return [chunk async for chunk in stub.GetTokenizer(common.GetTokenizerRequest())]

    await asyncio.gather(*(ask() for _ in range(8)))
    assert made == [1]


def test_a_request_for_many_samples_makes_none_before_it_is_checked():
    tracemalloc.start()
    VllmAnswer(request(n=100_000), PROMPT)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000


async def test_what_it_lacks_is_unimplemented_with_a_sentence(running, stub):
    calls = (
        stub.FlushCache(common.FlushCacheRequest()),
        stub.StartProfile(common.StartProfileRequest()),
    )
    for call in calls:
        with pytest.raises(aio.AioRpcError, match=r"docs/protocols\.md") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert details(caught.value)["ErrorInfo"].reason == "NOT_OFFERED"


async def test_kv_events_are_off_unless_asked_for(running, stub):
    call = stub.SubscribeKvEvents(common.SubscribeKvEventsRequest())
    with pytest.raises(aio.AioRpcError, match="with --kv-events it would") as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    # Only so does the gateway ask no more.
    assert "x-request-id" not in dict(await call.initial_metadata())


async def test_load(running, stub):
    running.engine.open.clear()
    waiting = asyncio.create_task(running.generate())
    await until(lambda: running.engine.running == 1)
    running.engine.open.set()
    await waiting
    (load,) = (await stub.GetLoads(pb.GetLoadsRequest(include=["core"]))).loads
    assert (load.num_running_reqs, load.max_total_num_tokens) == (running.engine.stats.running, 16_000)


async def test_it_is_off_unless_asked_for(running, stub):
    assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
    kserve = running.channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
    with pytest.raises(aio.AioRpcError) as caught:
        await kserve(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_names_of_protocols(monkeypatch):
    assert Settings(protocols=["vllm", " kserve", "vllm"]).protocols == "vllm,kserve"
    with pytest.raises(ValueError, match="'http' is no protocol here; those are vllm, kserve, channelz"):
        Settings(protocols="vllm,http")
    monkeypatch.setitem(sys.modules, "server.protocols.kserve", None)  # as where its package is not installed
    with pytest.raises(
        RefusedError, match=r"^--protocols kserve: .* install longspan\[protocols\], or leave it out"
    ):
        services("kserve", None)
