"""Chat templates that would never end, or fill the memory, are ended, and the next one is rendered."""

import os
import signal
import subprocess
import sys
import threading
import time

import jinja2
import psutil
import pytest

from server.errors import RefusedError
from server.text import chat, template_process
from server.text.chat_source import may_have_template
from server.text.errors import TextError
from server.text.template_process import NotRenderedError, TemplateEndedError, TemplateProcess
from server.text.tokenizer import Tokenizer
from tests.api.conftest import save_tokenizer

TURNS = [{"role": "user", "content": "hello"}]
PLAIN = "{{ messages[0].content }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{{ 9**(9**9) }}"


@pytest.fixture(scope="module")
def process():
    process = TemplateProcess(seconds=1.0)
    yield process
    process.close()


def test_what_does_not_end_is_ended_and_the_next_is_rendered(process):
    """In one step of Python, during which no signal's handler runs; the tests below have loops."""
    assert process.render(PLAIN, TURNS, {}) == "hello"
    begun = time.monotonic()
    with pytest.raises(TemplateEndedError, match="longer than 1 s"):
        process.render(POWER, TURNS, {})
    assert time.monotonic() - begun < 10
    assert process.render(PLAIN, TURNS, {}) == "hello"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ 'x' * 3000000000 }}", "it needs too much memory"),
        ("{{ 'x' * 2000000 }}", "it writes 2000000 characters; of this conversation it may make 1048612"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "it calls itself without end"),
        ("{{ raise_exception('not that') }}", "not that"),
        ("{{ messages.nothing.at_all }}", "'list object' has no attribute 'nothing'"),
    ],
)
def test_what_a_template_does_wrong_is_a_sentence(process, template, sentence):
    with pytest.raises(jinja2.TemplateError) as caught:
        process.render(template, TURNS, {})
    assert str(caught.value) == sentence
    assert process.render(PLAIN, TURNS, {}) == "hello"


def test_a_mistake_has_its_line(process):
    with pytest.raises(jinja2.TemplateSyntaxError) as caught:
        process.render("a\n{{ b }", TURNS, {})
    assert caught.value.lineno == 2


def test_long_conversations_and_marks_come_through(process):
    turns = [{"role": "user", "content": "\ud800\U0001f642é" + "x" * 500_000}] * 4
    assert process.render(
        "{{ t }}{% for m in messages %}{{ m.content }}{% endfor %}", turns, {"t": "<s>"}
    ) == ("<s>" + turns[0]["content"] * 4)


def test_one_that_has_died_is_started_again(process):
    process.render(PLAIN, TURNS, {})
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert process.render(PLAIN, TURNS, {}) == "hello"


@pytest.mark.parametrize("more", [0, 1 << 20])
def test_one_that_is_stopped_is_not_the_templates_fault(process, more, monkeypatch):
    monkeypatch.setattr(template_process, "_SILENT_SECONDS", 0.2)
    turns = [{"role": "user", "content": "hello" + more * "x"}]  # a pipe takes 64 KiB that are not read
    assert process.render(PLAIN, turns, {}) == turns[0]["content"]
    stopped = process._process.pid
    os.kill(stopped, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(NotRenderedError, match=r"did not answer within 1\.2 s"):
        process.render(PLAIN, turns, {})
    assert time.monotonic() - begun < 8
    assert process._process.pid != stopped, "another one gets ready"
    assert process.render(PLAIN, turns, {}) == turns[0]["content"]


def test_one_that_is_killed_is_not_the_templates_fault(process, monkeypatch):
    monkeypatch.setattr(process, "_seconds", 20.0)
    process.render(PLAIN, TURNS, {})
    killing = threading.Timer(0.3, os.kill, (process._process.pid, signal.SIGKILL))
    killing.start()
    with pytest.raises(NotRenderedError, match="was killed"):
        process.render(LOOPS, TURNS, {})
    killing.join()
    assert process.render(PLAIN, TURNS, {}) == "hello"


@pytest.mark.parametrize("template", [PLAIN, None])
def test_a_folder_tells_whether_one_is_needed(template, tmp_path):
    save_tokenizer(tmp_path, template)
    assert may_have_template(tmp_path, None) == (template is not None)
    assert may_have_template(tmp_path, "file.jinja")


def test_a_closed_one_is_no_zombie():
    process = TemplateProcess()
    process.start()
    own = process._process
    process.close()
    assert own.returncode == -signal.SIGKILL, "it was waited for"
    assert (own.stdin.closed, own.stdout.closed) == (True, True)
    process.close()


def test_closing_ends_what_waits_for_its_turn_too(process, monkeypatch):
    monkeypatch.setattr(process, "_seconds", 20.0)
    process.render(PLAIN, TURNS, {})
    before = set(psutil.Process().children())
    errors = []

    def render():
        with pytest.raises(NotRenderedError) as caught:
            process.render(LOOPS, TURNS, {})
        errors.append(str(caught.value))

    waiting = [threading.Thread(target=render, daemon=True) for _ in range(4)]
    for thread in waiting:
        thread.start()
    time.sleep(0.2)
    process.close()
    for thread in waiting:
        thread.join(5)
    assert errors == ["the process that renders chat templates has been closed"] * 4
    assert set(psutil.Process().children()) < before, "none was started in its place"
    assert process.render(PLAIN, TURNS, {}) == "hello", "another model's"


def test_it_ends_with_whoever_started_it():
    program = (
        "from server.text.template_process import TemplateProcess; import os;"
        "process = TemplateProcess(); process.start(); print(process._process.pid, flush=True); os._exit(0)"
    )
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{int(started.stdout)}"):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_model_whose_template_does_not_end_serves_no_conversations(process, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "template_process", lambda: process)
    save_tokenizer(tmp_path, LOOPS + PLAIN)
    begun = time.monotonic()
    tokenizer = Tokenizer(tmp_path)
    assert time.monotonic() - begun < 10
    assert not tokenizer.has_chat_template
    assert "fails on a plain question: it takes longer than 1 s" in tokenizer.chat_refusal
    with pytest.raises(RefusedError, match="takes longer"):
        Tokenizer(tmp_path, "default")


def test_one_conversation_that_does_not_end_spoils_no_other(process, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "template_process", lambda: process)
    save_tokenizer(tmp_path, f"{PLAIN}{{% if messages[0].content == 'loop' %}}{LOOPS}{{% endif %}}")
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(TextError, match="refuses this conversation: it takes longer than 1 s"):
        tokenizer.encode_chat([{"role": "user", "content": "loop"}])
    assert tokenizer.encode_chat(TURNS) == list(b"hello")


def test_a_process_that_does_not_start_is_not_the_templates_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    process = TemplateProcess()
    process.start()
    with pytest.raises(NotRenderedError, match="FileNotFoundError"):
        process.render(PLAIN, TURNS, {})
    monkeypatch.setattr(chat, "template_process", lambda: process)
    with pytest.raises(RefusedError, match="the process that renders chat templates does not start: FileNot"):
        Tokenizer(save_tokenizer(tmp_path / "model", PLAIN), None)
    monkeypatch.undo()
    assert process.render(PLAIN, TURNS, {}) == "hello"
    process.close()
