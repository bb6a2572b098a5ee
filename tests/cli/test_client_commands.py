from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from longspan import DEFAULT_HOST, DEFAULT_PORT
from longspan.reading import prompts
from server.cli import shared
from server.cli.read import _excerpt
from tests.command import longspan, on_a_terminal
from tests.scripted import Running

LONGSPAN = str(Path(sys.executable).parent / "longspan")


def generate(server: Running, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return longspan("generate", *arguments, "--port", str(server.port), **options)


def test_the_defaults_are_the_clients() -> None:
    from server.settings import Settings

    fields = Settings.model_fields
    assert shared.DEFAULT_HOST == DEFAULT_HOST == fields["host"].default
    assert shared.DEFAULT_PORT == DEFAULT_PORT == fields["port"].default


def test_generate_prints_the_text_and_nothing_else(server: Running) -> None:
    command = [LONGSPAN, "generate", "[bold]x[/bold]\n\\", "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("\\\n]dlob/[x]dlob[", "", 0)


def test_options_arrive(server: Running) -> None:
    options = "--max-tokens 3 --temperature 0 --top-p 0.5 --top-k 4 --min-p 0.25 --seed 9 --stop a --stop b"
    options += " --priority 3"
    done = generate(server, "hello", "--model", "mirror", *options.split())
    assert done.stdout == "oll"
    (request,) = server.service.requests
    sampling = request.sampling
    assert sampling.HasField("temperature")
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 4)
    assert (sampling.min_p, sampling.seed, request.priority) == (0.25, 9, 3)
    assert (request.model, request.text, list(request.stop.stop_strings)) == ("mirror", "hello", ["a", "b"])
    assert not request.special_tokens_as_text
    generate(server, "hello", "--as-text")
    assert server.service.requests[-1].special_tokens_as_text


def test_chat_with_a_system_turn(server: Running) -> None:
    generate(server, "Hi", "--chat", "--system", "Be brief.")
    turns = [(message.role, message.content) for message in server.service.requests[0].chat.messages]
    assert turns == [("system", "Be brief."), ("user", "Hi")]
    done = generate(server, "Hi", "--system", "Be brief.")
    assert done.returncode == 2
    assert "--system needs --chat" in done.stderr


def test_prompt_from_standard_input(server: Running) -> None:
    assert generate(server, "-", input="añb").stdout == "bña"


def test_standard_input_that_is_not_text(server: Running) -> None:
    command = [LONGSPAN, "generate", "-", "--port", str(server.port)]
    done = subprocess.run(command, input=b"\xff", capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"standard input is not UTF-8 text" in done.stderr


def test_json(server: Running) -> None:
    document = json.loads(generate(server, "héllo", "--json").stdout)
    assert document["text"] == "olléh"
    assert (document["request_id"], document["model"], document["finish_reason"]) == ("r1", "mirror", "stop")
    assert document["usage"] == {
        "prompt_tokens": 5,
        "cached_prompt_tokens": 1,
        "completion_tokens": 5,
        "draft_tokens": 0,
        "accepted_draft_tokens": 0,
    }
    assert document["timings"]["decode_seconds"] == 1.0


def test_stats(server: Running) -> None:
    done = generate(server, "hello", "--stats")
    assert done.stdout == "olleh"
    assert done.stderr == ("5 prompt tokens (1 cached), 5 tokens, 4.0 tokens/s, first token after 250 ms\n")


def test_on_a_terminal_text_ends_with_a_newline_and_stats_follow(server: Running) -> None:
    assert on_a_terminal("generate", "ab", "--port", str(server.port), errors=True) == [
        "ba",
        "2 prompt tokens (1 cached), 2 tokens, 1.0 tokens/s, first token after 250 ms",
    ]


HOSTILE = "\x1b]0;title\x07a\x9b2J\x7f\tb\r\x08\ncd"
ESCAPED = "\\u001b]0;title\\u0007a\\u009b2J\\u007f\tb\\u000d\\u0008\ncd"


def test_a_terminal_gets_no_control_characters_of_an_answer(server: Running) -> None:
    asked = ["generate", HOSTILE[::-1], "--port", str(server.port)]  # it answers backwards
    assert "\n".join(on_a_terminal(*asked, errors=False)).expandtabs() == ESCAPED.expandtabs()
    (line,) = on_a_terminal(*asked, "--json", errors=False)
    assert line.isprintable()
    assert json.loads(line)["text"] == HOSTILE
    assert longspan(*asked).stdout == HOSTILE


def test_nor_of_a_reading_or_an_error(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Text.\n")
    reading = ["read", str(file), "--citations", "0", "--question", HOSTILE[::-1], "--port", str(server.port)]
    printed = "\n".join(on_a_terminal(*reading, errors=False)).expandtabs()
    assert ESCAPED.expandtabs() in printed
    assert "\x1b" not in printed
    (line,) = on_a_terminal("read", "\x1b[2J", errors=True)
    assert line.startswith("longspan: \\u001b[2J can't be read")


def test_errors_are_sentences_with_the_fields_at_fault(server: Running) -> None:
    done = generate(server, "!invalid")
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr == ("longspan: the request has 2 mistakes\n  sampling.top_p: is above 1\n  n: is 0\n")
    done = generate(server, "hi", "--seed", "-1")
    assert done.returncode == 1
    assert done.stderr.startswith("longspan: sampling.seed: -1 does not fit")
    assert len(done.stderr.splitlines()) == 1


def test_no_server_answers() -> None:
    for command in (["generate", "hi"], ["health"]):
        done = longspan(*command, "--port", "1")
        assert done.returncode == 1
        assert done.stderr.startswith("longspan: No server answers at 127.0.0.1:1 ")
        assert "Traceback" not in done.stderr


def test_timeout(server: Running) -> None:
    done = generate(server, "!forever", "--timeout", "1")
    assert done.returncode == 1
    assert "did not answer in time" in done.stderr
    assert server.service.ended.acquire(timeout=5)


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_interrupt_cancels_on_the_server(server: Running, extra: list[str]) -> None:
    command = [LONGSPAN, "generate", "!forever", *extra, "--port", str(server.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert server.service.forever.acquire(timeout=30)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == b""
    assert server.service.ended.acquire(timeout=5)


def test_ctrl_c_ends_a_wait_without_a_word() -> None:
    command = [LONGSPAN, "health", "--wait", "--port", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while "cygrpc" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (130, b"", b"")


def test_a_closed_pipe_cancels_on_the_server(server: Running) -> None:
    command = [LONGSPAN, "generate", "!forever", "--port", str(server.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"on "
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert server.service.ended.acquire(timeout=5)


def test_health(server: Running) -> None:
    assert longspan("health", "--port", str(server.port)).returncode == 0
    server.set_ready(False)
    done = longspan("health", "--port", str(server.port))
    assert done.returncode == 1
    assert "up but not ready" in done.stderr
    done = longspan("health", "--wait", "--timeout", "0.5", "--port", str(server.port))
    assert done.returncode == 1
    assert "Not ready within 0.5 s" in done.stderr
    begun = time.monotonic()
    threading.Timer(0.5, server.set_ready, [True]).start()
    done = longspan("health", "--wait", "--timeout", "30", "--port", str(server.port))
    assert done.returncode == 0
    assert time.monotonic() - begun >= 0.5


def test_address_from_the_environment(server: Running) -> None:
    assert longspan("health", environment={"LONGSPAN_PORT": str(server.port)}).returncode == 0


def test_read_refuses_what_it_cannot_do(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("Some text.\n")
    for words, code, sentence in (
        ([str(tmp_path / "none")], 2, "can't be read: No such file"),
        ([str(file), "--method", "skimming"], 2, "choose from map-reduce, hierarchical, extractive"),
        ([str(file), "--top", "3"], 2, "--top needs --method extractive"),
        ([str(file), "--model", "gpt-9"], 1, "no such model"),
    ):
        done = longspan("read", *words, "--port", str(server.port))
        assert (done.returncode, done.stdout) == (code, "")
        assert sentence in done.stderr
    done = longspan("read", "-", "--port", str(server.port), input="\n")
    assert (done.returncode, done.stderr) == (2, "longspan: -: has no text; give a document that has\n")


def test_read_says_when_no_passage_answers(server: Running) -> None:
    said = prompts.NOTHING[::-1]  # the server answers backwards
    done = longspan("read", "-", "--question", said, "--port", str(server.port), input="Text.\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "longspan: no passage tells an answer to the question\n"


def test_read_says_when_nothing_supports_the_answer(server: Running) -> None:
    done = longspan("read", "-", "--question", "Why?", "--port", str(server.port), input="Text.\n")
    assert done.returncode == 0
    assert done.stdout.startswith(":rewsnA")
    assert done.stderr == (
        "longspan: no passage makes this answer more likely than the question by itself does; it may not be "
        "from the document\n"
    )


def test_ctrl_c_ends_a_reading_on_the_server(server: Running, tmp_path: Path) -> None:
    server.service.hold = True
    file = tmp_path / "text"
    file.write_text("Some text.\n")
    command = [LONGSPAN, "read", str(file), "--port", str(server.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert server.service.forever.acquire(timeout=30)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (130, b"", b"")
    assert server.service.ended.acquire(timeout=5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "hello", "there"], "put a text with spaces into quotes"),
        (["read", "manual.txt", "Who wrote it?"], "name an option before its value"),
        (["read", "manual.txt", "--question", " "], "--question is empty; leave it out for a summary"),
    ],
)
def test_mistakes_are_told_with_what_to_do(arguments: list[str], told: str) -> None:
    done = longspan(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in " ".join(done.stderr.split())


def test_small_passages_need_no_other_overlap_and_excerpts_no_terminal(
    server: Running, tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("He wrote it.")
    done = longspan(
        "read", str(file), "--question", "Who?", "--passage-tokens", "100", "--port", str(server.port)
    )
    assert done.returncode == 0, done.stderr
    assert _excerpt("He wrote \x1b[2Jit.", "he wrote") == "He wrote  [2Jit."
    long = _excerpt("word " * 200 + "He wrote it. " + "word " * 200, "he wrote it")
    assert "He wrote it." in long, "of one enormous line the part that tells it"
    assert len(long) <= 160


def test_a_document_without_an_end_is_refused(server: Running) -> None:
    done = longspan("read", "/dev/zero", "--port", str(server.port))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "longspan: /dev/zero has more than 256 MiB; read it in parts\n"
