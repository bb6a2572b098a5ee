from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from longspan import (
    AsyncClient,
    BusyError,
    CancelledError,
    DeadlineError,
    FinishReason,
    InvalidRequestError,
    UnavailableError,
)
from tests.scripted import Running


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(port=server.port, timeout=20) as connected:
        yield connected


async def ended(server: Running) -> bool:
    return await asyncio.to_thread(server.service.ended.acquire, timeout=5)


async def test_generate(client: AsyncClient, server: Running) -> None:
    answer = await client.generate([("user", "Hi")], temperature=0, n=2)
    assert answer.text == "user: Hi\n"[::-1]
    assert answer.finish_reason is FinishReason.STOP
    assert len(answer.completions) == 2
    assert server.service.requests[0].sampling.HasField("temperature")


async def test_stream(client: AsyncClient) -> None:
    stream = client.stream("hello", max_tokens=3)
    assert "".join([delta.text async for delta in stream]) == "oll"
    assert stream.finish_reason is FinishReason.LENGTH
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 3
    assert (stream.request_id, stream.prompt_tokens) == ("r1", 5)


async def test_many_streams_at_once(client: AsyncClient) -> None:
    async def ask(prompt: str) -> str:
        return "".join([delta.text async for delta in client.stream(prompt)])

    prompts = [f"prompt {index}" for index in range(16)]
    assert await asyncio.gather(*map(ask, prompts)) == [prompt[::-1] for prompt in prompts]


async def test_break_cancels_on_the_server(client: AsyncClient, server: Running) -> None:
    stream = client.stream("!forever")
    async for _ in stream:
        break
    assert await ended(server)
    with pytest.raises(CancelledError):
        [_ async for _ in stream]


async def test_with_cancels_on_the_server(client: AsyncClient, server: Running) -> None:
    async with client.stream("!forever") as stream:
        iterator = aiter(stream)
        await anext(iterator)
    assert await ended(server)


async def test_close_from_another_task_ends_the_loop(client: AsyncClient, server: Running) -> None:
    stream = client.stream("!forever")

    async def read() -> None:
        async for _ in stream:
            pass

    task = asyncio.create_task(read())
    await asyncio.to_thread(server.service.forever.acquire, timeout=5)
    stream.close()
    with pytest.raises(CancelledError):
        await task
    assert await ended(server)


@pytest.mark.parametrize("call", ["generate", "stream"])
async def test_cancelling_the_task_cancels_on_the_server(
    client: AsyncClient, server: Running, call: str
) -> None:
    async def read() -> None:
        if call == "generate":
            await client.generate("!forever")
        async for _ in client.stream("!forever"):
            pass

    task = asyncio.create_task(read())
    await asyncio.to_thread(server.service.forever.acquire, timeout=5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ended(server)


async def test_errors(client: AsyncClient, server: Running) -> None:
    with pytest.raises(BusyError) as raised:
        await client.generate("!busy")
    assert raised.value.retry_after == 2.5
    with pytest.raises(InvalidRequestError) as invalid:
        [_ async for _ in client.stream("!invalid")]
    assert [violation.field for violation in invalid.value.violations] == ["sampling.top_p", "n"]
    with pytest.raises(DeadlineError):
        [_ async for _ in client.stream("!forever", timeout=0.2)]
    assert await ended(server)


async def test_the_other_calls(client: AsyncClient, server: Running) -> None:
    assert list((await client.tokenize("hi")).tokens) == ["<s>", "h", "i"]
    assert await client.detokenize([104, 105]) == "hi"
    assert (await client.count_tokens("hey")).token_count == 3
    await client.tokenize("hey", special_tokens_as_text=True)
    await client.count_tokens("hey", special_tokens_as_text=True)
    flags = [getattr(request, "special_tokens_as_text", None) for request in server.service.requests]
    assert flags == [False, False, True, True]
    assert await client.models() == ["mirror"]
    assert (await client.model_info()).name == "mirror"
    assert (await client.server_info()).version == "1.2.3"
    assert await client.abort("running")


async def test_health(client: AsyncClient, server: Running) -> None:
    assert await client.health()
    server.set_ready(False)
    assert not await client.health()
    with pytest.raises(UnavailableError, match="up but not ready"):
        await client.wait_until_ready(0.3)
    asyncio.get_running_loop().call_later(0.3, server.set_ready, True)
    await client.wait_until_ready(10)


async def test_both_clients_offer_the_same(client: Any) -> None:
    import inspect

    from longspan import Client

    def calls(cls: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(cls, inspect.isfunction)
        return {
            name: [str(parameter) for parameter in inspect.signature(method).parameters.values()]
            for name, method in methods
            if not name.startswith("_")
        }

    assert calls(AsyncClient) == calls(Client)
