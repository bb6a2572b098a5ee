"""What a client that repeats calls needs of the server: nothing is answered before a call has truly begun."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from longspan import AsyncClient, UnavailableError
from longspan.v1 import inference_pb2
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


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_during_which_the_engine_dies_is_not_sent_again(running, stream):
    """It may be what ended the engine, and would end the next one too."""
    running.engine.open.clear()
    async with AsyncClient(port=running.port) as client:
        if stream:
            asking = asyncio.ensure_future(anext(aiter(client.stream("hello"))))
        else:
            asking = asyncio.ensure_future(client.generate("hello"))
        await until(lambda: running.engine.running == 1)
        running.engine.die("it was killed")
        with pytest.raises(UnavailableError, match="lost its engine"):
            await asking
    labels = {"finish_reason": "none", "grpc_code": "UNAVAILABLE"}
    assert running.sample("longspan_requests_total", **labels) == 1
