"""Documents longer than a passage, read by the real model on the real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from loadtest import texts
from loadtest.evaluation.prompts import plain
from loadtest.tasks.registry import make
from loadtest.tasks.score import score
from longspan import AsyncClient
from longspan.reading import METHODS, Method, ReadOptions, Spent, prompts, read
from longspan.reading.session import Session
from tests.command import longspan
from tests.e2e.server import Server

pytestmark = pytest.mark.long

Result = TypeVar("Result")

FACT = "The special magic number for crimson-otter is: 7314902."
QUESTION = "What is the special magic number for crimson-otter?"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six paragraphs of a manual, some 600 tokens, with a fact among them."""
    paragraphs = texts.prose(texts.reference()).split("\n")[40:46]
    file = tmp_path_factory.mktemp("reading") / "manual.txt"
    file.write_text("\n\n".join([*paragraphs[:3], FACT, *paragraphs[3:]]) + "\n")
    return file


FACTS = (
    (FACT, QUESTION, "7314902"),
    (
        "The lighthouse keeper of Port Ellery was called Agnes Thornbury.",
        "Who was the lighthouse keeper of Port Ellery?",
        "Thornbury",
    ),
    (
        "The annual budget of the museum in Halden was 4.2 million crowns.",
        "How large was the annual budget of the museum in Halden?",
        "4.2 million",
    ),
    (
        "Doctor Quill discovered the blue fungus in 1883.",
        "In which year did Doctor Quill discover the blue fungus?",
        "1883",
    ),
)


def on(server: Server, ask: Callable[[AsyncClient], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with AsyncClient(port=server.port, timeout=120) as client:
            return await ask(client)

    return asyncio.run(run())


@pytest.mark.parametrize("method", ["map-reduce", "extractive"])
def test_the_answer_and_the_passage_it_is_from(server: Server, document: Path, method: str) -> None:
    command = ["read", str(document), "--question", QUESTION, "--method", method]
    done = longspan(*command, "--passage-tokens", "120", "--port", str(server.port), "--json")
    assert done.returncode == 0, done.stderr
    reading = json.loads(done.stdout)
    assert "7314902" in reading["text"]
    assert reading["passages"] >= 5
    best = reading["citations"][0]
    content = document.read_bytes()
    assert FACT in best["text"]
    assert content[best["start"] : best["end"]].decode() == best["text"]
    line = content.decode().split("\n").index(FACT) + 1
    assert best["first_line"] <= line <= best["last_line"]


def test_a_score_is_the_log_probability_of_the_answer(server: Server) -> None:
    """Forced tokens, one step each, against the log probabilities of one prompt that has them all."""
    prompt, answer = prompts.note(FACT, QUESTION), "It is 7314902, as the text says."

    async def both(client: AsyncClient) -> tuple[float, float]:
        session = Session(client, ReadOptions(), True, Spent())
        ids = await session.tokens(answer)
        before = (await client.tokenize([("user", prompt)], special_tokens_as_text=True)).token_ids
        whole = await client.generate([*before, *ids], max_tokens=1, prompt_logprobs=0)
        given = [position.chosen.logprob for position in whole.prompt_logprobs[-len(ids) :]]
        return await session.score(prompt, ids), sum(given) / len(given)

    score, expected = on(server, both)
    assert score == pytest.approx(expected, abs=0.05)


def test_a_summary_cites_too(server: Server, document: Path) -> None:
    command = ["read", "-", "--method", "hierarchical"]
    command += ["--passage-tokens", "150", "--max-tokens", "24", "--port", str(server.port), "--stats"]
    done = longspan(*command, input=document.read_text()[:1300])
    assert done.returncode == 0
    answer, *cited = done.stdout.split("\n\n")
    assert len(answer) > 20
    assert "nats per token" in cited[0]
    assert "passages of at most 150 tokens" in done.stderr


@pytest.mark.stress
@pytest.mark.parametrize("method", METHODS)
def test_facts_in_a_document_longer_than_the_context(server: Server, method: Method) -> None:
    """Some 18,000 tokens, of a model with a context of 8,192."""
    paragraphs = texts.prose(texts.reference())[:80_000].split("\n")
    for number, (fact, _, _) in enumerate(FACTS):
        paragraphs.insert(int(len(paragraphs) * (number + 0.5) / len(FACTS)), fact)
    content = "\n\n".join(paragraphs).encode()
    tokens = on(server, lambda client: client.count_tokens(content.decode())).token_count
    found, cited, began = 0, 0, time.monotonic()
    for fact, question, answer in FACTS:
        options = ReadOptions(method=method)
        reading = on(server, lambda client, q=question, o=options: read(client, content, q, o))
        found += answer in reading.text
        cited += any(fact in one.passage.text for one in reading.citations)
        print(f"{method}: {reading.text!r} {reading.spent}")
    seconds = (time.monotonic() - began) / len(FACTS)
    print(f"{method}: {tokens} tokens, {found} found and {cited} cited of 4, {seconds:.1f} s each")
    assert tokens > 8192
    assert min(found, cited) >= 2


@pytest.mark.stress
def test_needles_beside_the_whole_context(server: Server) -> None:
    """RULER's niah_multikey_1 at 7,000 tokens: one of four numbers asked, in parts and in one prompt."""
    prose = texts.prose(texts.reference())
    right = dict.fromkeys(("extractive", "map-reduce", "full"), 0.0)
    for index in range(3):
        with server.client() as client:
            (sample,) = make(
                "niah_multikey_1", lambda text: len(plain(client, text)), prose, 7000, index, 7, reserve=1
            )
            content = sample.context.partition("\n")[2].encode()
            question = sample.question.strip().replace(" in the text above", "")
            for method in ("extractive", "map-reduce"):
                began, options = time.monotonic(), ReadOptions(method=method)
                reading = on(server, lambda client, q=question, c=content, o=options: read(client, c, q, o))
                right[method] += score(sample, reading.text)
                print(f"{method}: {time.monotonic() - began:.1f} s, {reading.text!r}")
            began = time.monotonic()
            prompt = sample.context + sample.question + sample.answer_prefix
            answer = client.generate(prompt, max_tokens=24, temperature=0)
            right["full"] += score(sample, answer.text)
            print(f"full: {time.monotonic() - began:.1f} s, {answer.text!r}")
    print(right)
    assert min(right.values()) >= 1
