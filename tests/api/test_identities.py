"""Identities in the life of requests: whose names, whose limits, whose pages."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from longspan.v1 import inference_pb2
from server.access.callers import Callers
from server.access.identities import token_hash
from tests.api.conftest import ask, details, until

ALICE = (("authorization", "Bearer of alice"),)
BOB = (("authorization", "Bearer of bob"),)
CAROL = (("authorization", "Bearer of carol"),)


@pytest.fixture
def callers(tmp_path):
    file = tmp_path / "identities.toml"
    file.write_text(
        f"[alice]\ntoken_sha256 = ['{token_hash('of alice')}']\nrequests_in_flight = 1\nmax_priority = 2\n"
        f"[bob]\ntoken_sha256 = ['{token_hash('of bob')}']\ntokens_per_minute = 60\n"
        f"[carol]\ntoken_sha256 = ['{token_hash('of carol')}']\nkv_tokens = 60\n"
    )
    return Callers(file)


async def refused(call) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer of eve"),)])
async def test_a_call_without_a_known_token_gets_nowhere(running, metadata):
    stub, requests = running.stub, inference_pb2
    everything = [
        await refused(getattr(stub, name)(getattr(requests, f"{name}Request")(), metadata=metadata))
        for name in ("Generate", "Abort", "Tokenize", "ListModels", "GetModelInfo", "GetServerInfo")
    ]
    stream = stub.StreamGenerate(requests.StreamGenerateRequest(), metadata=metadata)
    everything.append(await refused(stream.read()))
    for error in everything:
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "token" in error.details()
        assert details(error)["ErrorInfo"].reason == "UNAUTHENTICATED"
    assert not running.engine.submitted
    labels = {"grpc_type": "unary", "grpc_service": "longspan.v1.InferenceService"}
    sample = "longspan_grpc_server_handled_total"
    assert running.sample(sample, **labels, grpc_method="Generate", grpc_code="UNAUTHENTICATED") == 1


async def test_a_refused_call_costs_no_parsing(running, monkeypatch):
    def parse(*_):
        raise AssertionError("the message of a stranger was looked at")

    monkeypatch.setattr(running.state, "check_message", parse)
    error = await refused(running.stub.Generate(ask("x" * 100_000)))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_strangers_do_not_fill_the_log(running, caplog):
    with caplog.at_level(logging.INFO):
        await refused(running.stub.Generate(ask()))
    assert not caplog.records


async def test_health_is_open_and_reflection_is_not(running):
    health = health_pb2_grpc.HealthStub(running.channel)
    assert (
        await health.Check(health_pb2.HealthCheckRequest())
    ).status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    # Without a message: a client that is refused while it sends one says INTERNAL.
    error = await refused(reflection.ServerReflectionInfo().read())
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    answer = await reflection.ServerReflectionInfo(iter([request]), metadata=ALICE).read()
    assert len(answer.list_services_response.service) == 5


async def test_a_stream_that_outlives_its_token_gets_no_further_answers(running, callers):
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = stub.ServerReflectionInfo(metadata=ALICE)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    await call.write(asked)
    await call.read()
    callers.file.write_text(f"[bob]\ntoken_sha256 = ['{token_hash('of bob')}']\n")
    callers.look()
    await call.write(asked)
    assert (await refused(call.read())).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_names_of_requests_are_each_identitys_own(running):
    running.engine.open.clear()
    first = asyncio.ensure_future(running.stub.Generate(ask(request_id="r"), metadata=BOB))
    await until(lambda: running.engine.running == 1)
    second = asyncio.ensure_future(running.stub.Generate(ask(request_id="r"), metadata=ALICE))
    await until(lambda: running.engine.running == 2)
    error = await refused(running.stub.Generate(ask(request_id="r"), metadata=BOB))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    abort = inference_pb2.AbortRequest(request_id="r")
    assert (await running.stub.Abort(abort, metadata=ALICE)).found
    assert (await second).completions[0].token_ids == []
    assert not first.done(), "it is bob's"
    assert not (await running.stub.Abort(abort, metadata=ALICE)).found
    running.engine.open.set()
    assert len((await first).completions[0].token_ids) == 5


async def test_requests_in_flight_of_one_identity(running):
    running.engine.open.clear()
    first = asyncio.ensure_future(running.stub.Generate(ask(), metadata=ALICE))
    await until(lambda: running.engine.running == 1)
    error = await refused(running.stub.Generate(ask(), metadata=ALICE))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(error)
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].metadata["limit"]) == ("REQUESTS_IN_FLIGHT", "1")
    assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    other = asyncio.ensure_future(running.stub.Generate(ask(), metadata=BOB))
    await until(lambda: running.engine.running == 2)
    running.engine.open.set()
    await asyncio.gather(first, other)
    await running.stub.Generate(ask(), metadata=ALICE)
    assert running.sample("longspan_request_rejections_total", reason="requests_in_flight") == 1


async def test_claims_of_one_identity(running):
    """5 tokens of prompt, which samples share, and ``max_tokens`` of each sample; at most 60."""
    running.engine.open.clear()
    two = asyncio.ensure_future(running.stub.Generate(ask(n=2, stop={"max_tokens": 20}), metadata=CAROL))
    await until(lambda: running.engine.running == 2)
    for _ in range(5):
        error = await refused(running.stub.Generate(ask(stop={"max_tokens": 11}), metadata=CAROL))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "claim 45 of at most 60 tokens of the KV cache, and this one claims 16; wait" in error.details()
    found = details(error)
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].metadata["limit"]) == ("KV_TOKENS", "60")
    seconds = found["RetryInfo"].retry_delay.ToTimedelta().total_seconds()
    assert seconds == 1, "as before anything has ended: refusals do not count"
    one = asyncio.ensure_future(running.stub.Generate(ask(stop={"max_tokens": 10}), metadata=CAROL))
    other = asyncio.ensure_future(running.stub.Generate(ask(), metadata=ALICE))
    await until(lambda: running.engine.running == 4)
    running.engine.open.set()
    await asyncio.gather(two, one, other)
    assert running.sample("longspan_request_rejections_total", reason="kv_tokens") == 5


@pytest.mark.parametrize("end", ["complete", "abort", "leave", "fail"])
async def test_a_claim_ends_with_its_request(running, end):
    most = ask(stop={"max_tokens": 55}, request_id="r")
    running.engine.open.clear()
    call = running.stub.Generate(most, metadata=CAROL)
    await until(lambda: running.engine.running == 1)
    assert (await refused(running.stub.Generate(ask(), metadata=CAROL))).code() is (
        grpc.StatusCode.RESOURCE_EXHAUSTED
    )
    if end == "abort":
        await running.stub.Abort(inference_pb2.AbortRequest(request_id="r"), metadata=CAROL)
    elif end == "leave":
        call.cancel()
    elif end == "fail":
        running.state.admission.fail_all(running.state.cut_off())
    running.engine.open.set()
    await asyncio.wait([asyncio.ensure_future(call.code())])
    await until(lambda: not len(running.state.admission))
    assert len((await running.stub.Generate(most, metadata=CAROL)).completions[0].token_ids) == 55


async def test_a_claim_that_no_wait_would_help(running):
    """Without ``max_tokens`` it is the whole context."""
    error = await refused(running.stub.Generate(ask(stop={}), metadata=CAROL))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = details(error)
    assert found["ErrorInfo"].reason == "CLAIM_TOO_LARGE"
    assert dict(found["ErrorInfo"].metadata) == {"limit": "60", "actual": "200"}
    assert "lower max_tokens or n" in found["BadRequest"].field_violations[0].description
    assert "RetryInfo" not in found
    assert not running.engine.submitted


async def test_without_a_prefix_cache_each_sample_claims_its_prompt(running):
    request = ask(n=2, stop={"max_tokens": 26})
    await running.stub.Generate(request, metadata=CAROL)
    running.state.settings = running.state.settings.model_copy(update={"prefix_cache": False})
    error = await refused(running.stub.Generate(request, metadata=CAROL))
    assert details(error)["ErrorInfo"].metadata["actual"] == "62"


async def test_the_log_says_whose_request_it_was(running, caplog):
    with caplog.at_level(logging.INFO, "longspan.requests"):
        await running.stub.Generate(ask(request_id="r"), metadata=ALICE)
    (record,) = caplog.records
    assert record.getMessage().startswith("request r of alice: OK")
    assert (record.identity, record.request_id) == ("alice", "r")


async def test_tokens_per_minute_of_one_identity(running):
    """60 a minute: a prompt of 5 and 70 tokens are 75, so that it waits for 16 tokens, a second each."""
    await running.stub.Generate(ask(stop={"max_tokens": 70, "ignore_eos": True}), metadata=BOB)
    error = await refused(running.stub.Generate(ask(), metadata=BOB))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(error)
    assert found["ErrorInfo"].reason == "TOKENS_PER_MINUTE"
    assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == pytest.approx(16, abs=1)
    await running.stub.Generate(ask(), metadata=ALICE)


async def test_a_search_is_charged_for_every_beam(running):
    """A prompt of 5 and 17 tokens of 4 beams are 73, though 17 are output; 14 tokens are to wait for."""
    search = {"beam_search": {"num_beams": 4}, "stop": {"max_tokens": 17, "ignore_eos": True}}
    neutral = {"sampling": {"repetition_penalty": 1.0}}
    answer = await running.stub.Generate(ask(**search, **neutral), metadata=BOB)
    assert answer.usage.completion_tokens == 17
    error = await refused(running.stub.Generate(ask(), metadata=BOB))
    assert details(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == pytest.approx(14, abs=1)


async def test_the_highest_priority_of_one_identity(running):
    for metadata, most in ((ALICE, 2), (BOB, 0)):
        await running.stub.Generate(ask(priority=most), metadata=metadata)
        error = await refused(running.stub.Generate(ask(priority=most + 1), metadata=metadata))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert f"{most} at most" in error.details()
        assert details(error)["BadRequest"].field_violations[0].field == "priority"


async def test_sequences_carry_their_identitys_salt(running):
    for metadata in (ALICE, BOB, ALICE):
        await running.stub.Generate(ask(n=2), metadata=metadata)
    salts = [submit.salt for submit in running.engine.submitted]
    assert salts[:2] == salts[4:]
    assert len({*salts[:2]}) == len({*salts[2:4]}) == 1
    assert len({*salts, b""}) == 3
