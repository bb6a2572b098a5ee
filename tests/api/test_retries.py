"""What a client that repeats calls needs of the server: nothing is answered before a call has truly begun."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from grpc import aio

from longspan import AsyncClient
from longspan.v1 import inference_pb2, inference_pb2_grpc
from tests.api.conftest import ask, until


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_must_wait_is_answered_by_its_status_alone(running, stream):
    running.state.phase = "draining"
    if stream:
        call = running.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=ask()))
    else:
        call = running.stub.Generate(ask())
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert "x-request-id" not in dict(await call.initial_metadata())


async def test_a_client_comes_through_when_the_server_is_ready_again(running):
    """The first attempt finds it loading; others follow after 0.1, 0.3 and 0.7 s, give or take 20%."""
    running.state.phase = "loading"
    async with AsyncClient(port=running.port) as client:
        asking = asyncio.ensure_future(client.generate("hello", max_tokens=5))
        rejected = "longspan_request_rejections_total"
        await until(lambda: running.sample(rejected, reason="loading") == 1)
        running.state.phase = "ready"
        assert len((await asking).token_ids) == 5
    assert running.sample(rejected, reason="loading") == 1


async def test_an_engine_that_dies_during_a_prompt_has_the_call_repeated(running):
    """Nothing was answered, so that gRPC sends it again; here there is no other engine to take it."""
    running.engine.open.clear()
    config = {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 2,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.01s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    async with aio.insecure_channel(
        f"127.0.0.1:{running.port}", options=[("grpc.service_config", json.dumps(config))]
    ) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=ask()))
        reading = asyncio.ensure_future(call.read())
        await until(lambda: running.engine.running == 1)
        running.engine.die("it was killed")
        with pytest.raises(aio.AioRpcError, match="lost its engine"):
            await reading
    labels = {"finish_reason": "none", "grpc_code": "UNAVAILABLE"}
    assert running.sample("longspan_requests_total", **labels) == 2
