"""Long texts are tokenized beside the event loop, a few at a time, and not any number waits."""

import asyncio
import threading

import grpc
import pytest
from grpc import aio

from longspan.v1 import inference_pb2
from server.api import service
from server.api.errors import ServiceError
from server.api.text_work import TextWork
from tests.api.conftest import INVALID, ask, details, until

LONG = "x" * 5000


class Held:
    """Work that goes on until it is let go."""

    def __init__(self):
        self.begun = 0
        self.go_on = threading.Event()

    def __call__(self):
        self.begun += 1
        self.go_on.wait(10)
        return "done"


async def test_some_is_done_at_once_the_rest_waits_and_more_is_refused():
    work, held = TextWork(threads=2, most_jobs=3, most_characters=100), Held()
    jobs = [asyncio.ensure_future(work.run(held, 10)) for _ in range(3)]
    await until(lambda: held.begun == 2)
    assert work.jobs == 3
    with pytest.raises(ServiceError, match="3 long texts"):
        await work.run(held, 10)
    held.go_on.set()
    assert await asyncio.gather(*jobs) == ["done"] * 3
    assert (held.begun, work.jobs) == (3, 0)


async def test_characters_are_bounded_but_one_text_may_have_any_number():
    work, held = TextWork(most_characters=100), Held()
    one = asyncio.ensure_future(work.run(held, 1000))
    await until(lambda: held.begun == 1)
    with pytest.raises(ServiceError):
        await work.run(held, 1)
    held.go_on.set()
    await one
    assert await work.run(lambda: 7, 1) == 7


async def test_very_long_texts_are_worked_on_one_at_a_time():
    work, held = TextWork(threads=2), Held()
    jobs = [asyncio.ensure_future(work.run(held, 100_000)) for _ in range(2)]
    await until(lambda: held.begun == 1)
    assert await work.run(lambda: "short", 10) == "short"
    assert held.begun == 1
    held.go_on.set()
    assert await asyncio.gather(*jobs) == ["done"] * 2
    assert work.jobs == 0


async def test_who_leaves_frees_the_place_but_not_a_busy_thread():
    work, held = TextWork(threads=1, most_jobs=2), Held()
    busy, waiting = (asyncio.ensure_future(work.run(held, 1)) for _ in range(2))
    await until(lambda: held.begun == 1)
    for job in (busy, waiting):
        job.cancel()
    await asyncio.wait({busy, waiting})
    assert work.jobs == 1
    after = asyncio.ensure_future(work.run(lambda: "after", 1))
    await asyncio.sleep(0.05)
    assert not after.done()
    held.go_on.set()
    assert await after == "after"
    assert work.jobs == 0


async def test_an_error_is_the_callers():
    def fails():
        raise ValueError("no")

    work = TextWork()
    with pytest.raises(ValueError, match="no"):
        await work.run(fails, 1)
    assert work.jobs == 0


async def test_calls_with_long_texts_are_turned_away_when_many_wait(running):
    running.state.text_work = TextWork(most_jobs=0)
    calls = (
        (running.stub.Generate, ask(LONG)),
        (running.stub.Tokenize, inference_pb2.TokenizeRequest(text=LONG)),
        (running.stub.CountTokens, inference_pb2.CountTokensRequest(text=LONG)),
    )
    for call, request in calls:
        with pytest.raises(aio.AioRpcError) as caught:
            await call(request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(caught.value)["ErrorInfo"].reason == "TEXT_QUEUE_FULL"
        assert details(caught.value)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    await running.generate("short")


async def test_more_tokens_than_are_told_are_counted(running, monkeypatch):
    monkeypatch.setattr(service, "_MOST_TOKENS", 4900)
    count = await running.stub.CountTokens(inference_pb2.CountTokensRequest(text=LONG))
    assert (count.token_count, count.context_length) == (5000, 200)
    with pytest.raises(aio.AioRpcError) as caught:
        await running.stub.Tokenize(inference_pb2.TokenizeRequest(text=LONG))
    assert caught.value.code() is INVALID
    assert "has 5000 tokens; at most 4900" in caught.value.details()
    told = await running.stub.Tokenize(inference_pb2.TokenizeRequest(text=LONG[:4900]))
    assert (len(told.token_ids), list(told.tokens)) == (4900, ["x"] * 4900)
