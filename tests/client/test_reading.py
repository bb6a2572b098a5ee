"""Reading with a server whose tokens are characters and whose answers are its prompts backwards."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan import AsyncClient, BusyError, NotFoundError, UnavailableError
from longspan.reading import METHODS, Reading, ReadOptions, Spent, read
from longspan.reading.cut import Cutter
from longspan.reading.document import Document
from longspan.reading.session import Session
from longspan.v1 import inference_pb2
from tests.scripted import Running

Result = TypeVar("Result")

_PASSAGE = re.compile(
    r"Passage of a long document:\n(.*)\n\n(?:Answer the question|Write a question) .*", re.DOTALL
)

TEXT = "".join(
    f"Part {part}\n======\n\n" + "".join(f"Line {line} of it, é. And more!\n" for line in range(part))
    for part in range(1, 30)
)
UGLY = "a. b!\r\n\r\n  c\t" + "x" * 3000 + " \u00a0\n\n\n" + "日本語。" * 500 + "🦦" * 300 + "\n# H\nend"


def on(server: Running, ask: Callable[[AsyncClient], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with AsyncClient(port=server.port, timeout=20) as client:
            return await ask(client)

    return asyncio.run(run())


def asked(server: Running, question: str = "Which?", **options: object) -> Reading:
    return on(server, lambda client: read(client, TEXT.encode(), question, ReadOptions(**options)))  # type: ignore[arg-type]


@given(st.text(alphabet=st.sampled_from("aé🦦. \n\r\t#=-!\u2028"), min_size=1))
def test_a_document_can_be_cut_anywhere_without_loss(text: str) -> None:
    if not text.strip():
        with pytest.raises(ValueError, match="has no text"):
            Document(text.encode())
        return
    document, content = Document(text.encode()), text.encode()
    assert document.bounds[0] == 0
    assert document.bounds[-1] == len(content)
    assert sorted(set(document.bounds)) == list(document.bounds)
    sections = document.sections()
    assert b"".join(content[start:end] for start, end in sections) == content
    for start, end in [*pairwise(document.bounds), *sections]:
        passage = document.passage(start, end)
        if passage is None:
            assert not content[start:end].strip()
            continue
        assert passage.text.encode() == content[passage.start : passage.end] == content[start:end].strip()
        assert passage.first_line == content[: passage.start].count(b"\n") + 1
        assert passage.last_line == content[: passage.end].count(b"\n") + 1


def test_a_byte_order_mark_is_no_text() -> None:
    document = Document("\ufeff# One\n".encode())
    passage = document.passage(0, document.bounds[-1])
    assert passage is not None
    assert (passage.text, passage.start, passage.end) == ("# One", 3, 8)
    with pytest.raises(ValueError, match="has no text"):
        Document("\ufeff \n".encode())


def test_sections_begin_at_headings() -> None:
    text = "before\n\n# One\n\ntext\n\nTwo\n---\n\n| a |\n|---|\n\nThree\n\n## Four\n"
    document = Document(text.encode())
    parts = [text[start:end].split("\n")[0] for start, end in document.sections()]
    assert parts == ["before", "# One", "Two", "## Four"]


@pytest.mark.parametrize("text", [TEXT, UGLY])
@pytest.mark.parametrize("overlap", [0, 40])
def test_passages_have_room_and_lose_nothing(server: Running, text: str, overlap: int) -> None:
    content, most = text.encode(), 100
    document = Document(content)

    async def cut(client: AsyncClient) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]:
        session = Session(client, ReadOptions(), False, Spent())
        cutter = Cutter(document, session, most, overlap)
        await cutter.measure()
        parts = cutter.packed(document.sections())
        passages = await cutter.passages(parts)
        return parts, [[(one.start, one.end) for one in part] for part in passages]

    parts, cut_parts = on(server, cut)
    assert len(parts) > 1
    assert b"".join(content[start:end] for start, end in parts) == content
    for (start, end), passages in zip(parts, cut_parts, strict=True):
        assert all(start <= first < last <= end for first, last in passages)
        assert all(len(content[first:last].decode()) <= most for first, last in passages)  # mirror's tokens
        covered = bytearray(content[start:end])
        for first, last in passages:
            covered[first - start : last - start] = b" " * (last - first)
        assert not covered.strip()
        repeated = [one[1] - two[0] for one, two in pairwise(passages)]
        assert all(bytes_ <= 2 * overlap for bytes_ in repeated)  # a character has at most two here
        assert text is not TEXT or not overlap or len(passages) < 2 or max(repeated) > 0


@pytest.mark.parametrize("method", METHODS)
def test_every_passage_is_asked_once(server: Running, method: str) -> None:
    reading = asked(server, method=method, passage_tokens=400, overlap=0, citations=0, concurrency=1)
    sent = [one for one in server.service.requests if isinstance(one, inference_pb2.GenerateRequest)]
    first = sent[: reading.passages]
    found = [_PASSAGE.fullmatch(one.text) for one in first]
    assert "".join("".join(match[1].split()) for match in found if match) == "".join(TEXT.split())
    assert reading.passages == len(found) > 5
    assert reading.spent.requests == len(sent)
    assert all(one.special_tokens_as_text and one.sampling.temperature == 0 for one in sent)
    assert (reading.method, reading.model, reading.passage_tokens) == (method, "mirror", 400)
    if method == "extractive":
        assert {bytes(one.forced_token_ids) for one in first} == {b"Which?"}
        assert reading.used == 4
    else:
        assert {one.stop.max_tokens for one in first} == {64}
        assert reading.used == reading.passages


def test_a_busy_server_is_asked_again(server: Running) -> None:
    server.service.turn_away = 5
    reading = asked(server, passage_tokens=1000)
    assert reading.spent.waits == 5
    assert reading.text


def test_a_server_that_stays_busy_is_given_up(server: Running) -> None:
    server.service.turn_away = 10_000
    with pytest.raises(BusyError, match="the queue is full"):
        asked(server, passage_tokens=1000)
    assert server.service.turn_away > 10_000 - 30 * 20


def test_a_server_that_restarts_is_waited_for(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.reading.session._PAUSE", 0.01)
    whole = asked(server, passage_tokens=1000)
    server.service.away_after, server.service.away_for = 10, 60  # gRPC repeats each a few times by itself
    reading = asked(server, passage_tokens=1000)
    assert reading.spent.waits > 0
    assert server.service.away_for == 0
    assert (reading.text, reading.spent.requests) == (whole.text, whole.spent.requests)


def test_a_server_that_stays_away_is_given_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.reading.session._PAUSE", 0.01)
    monkeypatch.setattr("longspan.reading.session.RESTART_SECONDS", 0.5)
    server.service.away_after, server.service.away_for = 10, 1_000_000
    with pytest.raises(UnavailableError, match="restarts"):
        asked(server, passage_tokens=1000)


def test_an_error_ends_the_others(server: Running) -> None:
    with pytest.raises(NotFoundError):
        asked(server, model="gpt-9")


def test_cancelling_ends_all_requests_on_the_server(server: Running) -> None:
    server.service.hold = True

    async def leave(client: AsyncClient) -> None:
        reading = asyncio.create_task(read(client, TEXT.encode(), "Which?", ReadOptions(concurrency=3)))
        assert await asyncio.to_thread(server.service.forever.acquire, timeout=20)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    on(server, leave)
    assert server.service.ended.acquire(timeout=5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "skimming"}, "choose from map-reduce, hierarchical, extractive"),
        ({"passage_tokens": 31}, "passage_tokens is 31; it must be at least 32"),
        ({"max_tokens": 4000}, "no room for passages"),
        ({"method": "extractive", "question": " "}, "needs a question"),
    ],
)
def test_refusals_say_what_to_change(server: Running, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        asked(server, **options)  # type: ignore[arg-type]
