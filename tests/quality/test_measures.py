"""Each measure against a server whose answers are known."""

import math
import re
import time

import pytest

from loadtest.quality.decode_time import decode_times
from loadtest.quality.needle import needles
from loadtest.quality.perplexity import perplexity, pooled
from loadtest.quality.residency import pages_held
from loadtest.quality.types import Needle, Perplexity
from longspan import Client
from longspan.v1 import inference_pb2 as pb
from longspan.v1 import types_pb2
from tests.scripted import Mirror, serving

FILLER = ["Nothing is here.", "Nor is anything there, however long one looks.", "So it goes on."]


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture
def client(server):
    with Client(port=server.port, timeout=20) as connected:
        yield connected


def test_perplexity_counts_from_the_token_asked_for(server, client, monkeypatch):
    """Token ``n`` has probability 1 / n here, and the first has none."""

    def logprobs(token):
        one = types_pb2.TokenLogprob(token_id=ord(token), logprob=-math.log(ord(token)))
        return types_pb2.PositionLogprobs(chosen=one)

    monkeypatch.setattr(server.service, "_logprobs", logprobs)
    assert perplexity(client, [97, 50, 20, 5, 5], 3) == Perplexity(3, 2, pytest.approx(5, rel=1e-6))
    whole = perplexity(client, [97, 10, 20], 1)
    assert whole == Perplexity(1, 2, pytest.approx(math.sqrt(200), rel=1e-6))


@pytest.mark.parametrize("first", [0, 3])
def test_perplexity_needs_a_token_to_count(client, first):
    with pytest.raises(ValueError, match=f"tokens from {first} on are to count, but there are 3"):
        perplexity(client, [97, 98, 99], first)


def test_perplexity_of_several_texts_weighs_tokens_alike():
    parts = [Perplexity(10, 1, 16.0), Perplexity(10, 3, 2.0)]
    assert pooled(parts) == Perplexity(10, 4, pytest.approx(2 ** (7 / 4)))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("7291834.", True),
        ("the number 7291834", True),
        ("7,291,834!", True),
        ("72918341", False),
        ("729183", False),
        ("1. 7291834", False),
        ("a special key", False),
        ("", False),
    ],
)
def test_a_needle_counts_if_it_is_exact(answer, found):
    assert Needle(0.5, "7291834", answer, 100).found is found


def test_needles_are_found_where_the_model_can_see_them(server, client, monkeypatch):
    """A model that sees the last 500 characters, a token each."""

    def sees(request, prompt):
        match = re.search(r"The pass key is (\d{7})\. ", prompt[-500:])
        return (match[1] if match else "unknown"), types_pb2.FINISH_REASON_LENGTH

    monkeypatch.setattr(server.service, "_answer", sees)
    results = needles(client, FILLER, 1500, [0.1, 0.98, 0.5], 2)
    assert [(needle.depth, needle.found) for needle in results] == [
        (0.98, True),
        (0.98, True),
        (0.5, False),
        (0.5, False),
        (0.1, False),
        (0.1, False),
    ]
    assert len({needle.key for needle in results}) == 6
    prompts = [request.text for request in server.service.requests if request.HasField("text")][-6:]
    for prompt, needle in zip(prompts, results, strict=True):
        assert 1500 - max(map(len, FILLER)) <= len(prompt) == needle.prompt_tokens <= 1500
        assert prompt.count(needle.key) == 2
        assert prompt.index(needle.key) / len(prompt) == pytest.approx(needle.depth, abs=0.15)


def test_needles_need_room(client):
    with pytest.raises(ValueError, match="no sentence of filler fits into 100 tokens"):
        needles(client, FILLER, 100, [0.5], 1)


def test_decode_time_is_the_median_gap(monkeypatch):
    """A server that takes 20 ms per token after a long first one, and once 200 ms."""
    ordinary = Mirror.StreamGenerate

    def slow(self, request, context):
        seen = 0
        for event in ordinary(self, request, context):
            if event.HasField("delta"):
                seen += 1
                time.sleep({1: 0.3, 4: 0.2}.get(seen, 0.02))
            yield event

    monkeypatch.setattr(Mirror, "StreamGenerate", slow)
    with serving() as server, Client(port=server.port, timeout=20) as client:
        times = decode_times(client, [97] * 40, [40, 20], 12)
    assert [measured.context for measured in times] == [20, 40]
    for measured in times:
        assert 0.019 < measured.seconds < 0.1


def test_decode_time_needs_enough_tokens(client):
    with pytest.raises(ValueError, match="needs 50 ids and 2 output tokens, not 40 and 12"):
        decode_times(client, [97] * 40, [20, 50], 12)


def test_pages_are_counted_while_tokens_come(monkeypatch):
    held = iter([9, 5, 7, 6, 99])

    def info(self, request, context):
        return pb.GetServerInfoResponse(load=pb.Load(pages_used=next(held)))

    monkeypatch.setattr(Mirror, "GetServerInfo", info)
    with serving() as server, Client(port=server.port, timeout=20) as client:
        assert pages_held(client, [97] * 8, 6) == 9
    assert next(held) == 99
