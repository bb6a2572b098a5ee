"""Documents longer than a passage, read by the real model on the real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from loadtest import texts
from longspan import AsyncClient
from longspan.reading import METHODS, ReadOptions, Spent, prompts
from longspan.reading.session import Session
from tests.e2e.server import Server

pytestmark = pytest.mark.long

Result = TypeVar("Result")

FACT = "The special magic number for crimson-otter is: 7314902."
QUESTION = "What is the special magic number for crimson-otter?"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten paragraphs of a manual, some 1,500 tokens, with a fact among them."""
    paragraphs = texts.prose(texts.reference()).split("\n")[40:50]
    file = tmp_path_factory.mktemp("reading") / "manual.txt"
    file.write_text("\n\n".join([*paragraphs[:6], FACT, *paragraphs[6:]]) + "\n")
    return file


def on(server: Server, ask: Callable[[AsyncClient], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with AsyncClient(port=server.port, timeout=120) as client:
            return await ask(client)

    return asyncio.run(run())


@pytest.mark.parametrize("method", METHODS)
def test_the_answer_and_the_passage_it_is_from(server: Server, document: Path, method: str) -> None:
    command = [sys.executable, "-m", "server.cli", "read", str(document), "--question", QUESTION]
    command += ["--method", method, "--passage-tokens", "160", "--port", str(server.port), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
    command = [sys.executable, "-m", "server.cli", "read", "-", "--method", "hierarchical"]
    command += ["--passage-tokens", "400", "--max-tokens", "40", "--port", str(server.port), "--stats"]
    done = subprocess.run(
        command, input=document.read_text()[:3000], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    answer, *cited = done.stdout.split("\n\n")
    assert len(answer) > 20
    assert "nats per token" in cited[0]
    assert "passages of at most 400 tokens" in done.stderr
