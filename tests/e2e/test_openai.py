"""``make serve-openai``: the real gateway before the real server, asked by OpenAI's client."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import openai
import pytest

from longspan import Client

PROGRAM = Path(__file__).parents[2] / "deploy" / "openai" / "serve.py"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


class Gateway(NamedTuple):
    """Both servers' clients, and what the program printed."""

    openai: openai.OpenAI
    longspan: Client
    lines: list[str]


def free_port() -> int:
    """One whose neighbor is free, too, for the gateway's metrics."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@contextmanager
def gateway(*arguments: str) -> Iterator[Gateway]:
    port = free_port()
    command = [sys.executable, PROGRAM, "--gateway-port", str(port), "--port", "0", "--metrics-port", "0"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "try: curl" in line:
                break
        ready = re.search(r"is ready: \S+ on 127\.0\.0\.1:(\d+)\n", "".join(lines))
        assert ready, lines
        with (
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as asking,
            Client("127.0.0.1", int(ready[1])) as own,
        ):
            yield Gateway(asking, own, lines)
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def served(default_model):
    with gateway() as both:
        yield both


def chat(served: Gateway, **fields):
    given = {"model": "smollm2-135m-instruct", "messages": QUESTION, "max_tokens": 20, "temperature": 0}
    return served.openai.chat.completions.create(**{**given, **fields})


def test_a_chat_is_answered_as_by_longspan_itself(served):
    own = served.longspan.generate([("user", QUESTION[0]["content"])], max_tokens=20, temperature=0)
    answer = chat(served)
    assert answer.choices[0].message.content == own.text == "The capital of Japan is Tokyo."
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        own.usage.prompt_tokens,
        own.usage.completion_tokens,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens > 0, "the gateway's prompt is the same"


def test_a_stream(served):
    chunks = list(chat(served, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == "The capital of Japan is Tokyo."
    assert len([part for part in parts if part]) == 7
    assert chunks[-1].usage.completion_tokens == 8


def test_samples_seeds_stop_strings_and_log_probabilities(served):
    story = [{"role": "user", "content": "Tell a story."}]
    fields = {"messages": story, "temperature": 1, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2}
    first, second = (chat(served, **fields).choices for _ in range(2))
    assert [one.message.content for one in first] == [one.message.content for one in second]
    assert first[0].message.content != first[1].message.content
    assert len(first[0].logprobs.content[0].top_logprobs) == 2
    assert chat(served, stop=[" is"]).choices[0].message.content == "The capital of Japan"


def test_what_the_server_cannot_do_is_told(served):
    with pytest.raises(openai.BadRequestError, match="constrains the output, which this server does not"):
        chat(served, response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="for Embed ask a server of an encoder"):
        served.openai.embeddings.create(model="smollm2-135m-instruct", input="hello")


def test_a_client_that_leaves_ends_its_request(served):
    stream = chat(
        served, stream=True, max_tokens=4000, messages=[{"role": "user", "content": "Tell me all."}]
    )
    for _ in range(3):
        next(stream)
    assert served.longspan.server_info().load.running == 1
    stream.close()
    end = time.monotonic() + 10
    while served.longspan.server_info().load.running:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_line_that_is_printed_works(served):
    (line,) = (line for line in served.lines if "try: curl" in line)
    command = line.partition("try: ")[2].replace("curl ", "curl --silent --max-time 60 ", 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=90)
    assert "Tokyo" in done.stdout, done.stderr


@pytest.mark.parametrize("before", [0, 1])
def test_a_port_that_is_taken_is_refused_before_the_server_starts(before):
    """The gateway's own, and the next one, for its metrics."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, PROGRAM, "--gateway-port", str(port - before)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 can't be had" in done.stderr
    assert not done.stdout


@pytest.mark.stress  # a second server and gateway: nine seconds of processor time
def test_embeddings():
    """One text a request: of several the gateway (1.13) makes one."""
    with gateway("--model", "minilm") as both:
        for text in ("a cat", "an invoice"):
            (own,) = both.longspan.embed(text).embeddings
            answer = both.openai.embeddings.create(
                model=both.longspan.models()[0], input=text, encoding_format="float"
            )
            assert answer.data[0].embedding == pytest.approx(list(own.values), abs=1e-5)
            assert answer.usage.prompt_tokens == own.tokens
