"""The header by which a balancer keeps calls together."""

from __future__ import annotations

import pytest

from longspan import AsyncClient, Client
from longspan.affinity import HEADER, Affinity
from longspan.request import build_request


def value(prompt, by="prompt", **options):
    ((name, header),) = Affinity(by).of(build_request(prompt, options))
    assert name == HEADER
    return header


def test_prompts_that_begin_alike_have_one_value():
    start = "x" * 256
    assert value(start + "a") == value(start + "b") != value("y" + start)
    assert value([5] * 64 + [1]) == value([5] * 64 + [2]) != value([4] * 64)
    assert value("5 5") != value([5, 5])
    assert value("a", model="one") != value("a", model="two")
    assert value("é" * 300) == value("é" * 301)


def test_a_conversation_keeps_its_value_as_it_grows():
    talk = [("system", "Be brief."), ("user", "One?")]
    assert (
        value(talk) == value([*talk, ("assistant", "Two."), ("user", "Three?")]) != value([("user", "One?")])
    )


def test_a_session_has_one_value_whatever_it_asks():
    one = Affinity("session")
    assert one.of(build_request("a", {})) == one.of(build_request("b", {}))
    assert one.of(build_request("a", {})) != Affinity("session").of(build_request("a", {}))


def test_it_is_sent_with_generations_where_asked_for(server):
    with Client(port=server.port) as client:
        client.generate("hello")
        assert HEADER not in server.service.metadata
    with Client(port=server.port, affinity="prompt", metadata=[("a", "b")]) as client:
        client.generate("hello")
        assert server.service.metadata[HEADER] == value("hello")
        assert server.service.metadata["a"] == "b"
        list(client.stream("another"))
        assert server.service.metadata[HEADER] == value("another")


async def test_it_is_sent_by_the_asyncio_client_too(server):
    async with AsyncClient(port=server.port, affinity="prompt") as client:
        await client.generate("hello")
        assert server.service.metadata[HEADER] == value("hello")
        _ = [delta async for delta in client.stream("another")]
        assert server.service.metadata[HEADER] == value("another")


def test_other_kinds_are_refused(server):
    with pytest.raises(ValueError, match="affinity is 'prompt' or 'session', not 'user'"):
        Client(port=server.port, affinity="user")
