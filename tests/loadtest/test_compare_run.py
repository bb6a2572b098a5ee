"""``longspan compare`` as a whole: on the real default model, on servers that fail, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from loadtest.compare import document
from loadtest.compare.judge import judge
from loadtest.compare.plan import Asked, PlanError, budget, make_plan
from loadtest.compare.presets import QUICK, WHOLE
from loadtest.compare.types import Outcome
from loadtest.deployment import FULL
from tests.loadtest.synthetic import Sizes, draw
from tests.models_zoo import save_tiny

WINDOW = "sliding_window window=124 sinks=4"
COMMAND = [sys.executable, "-m", "server.cli", "compare"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Asked(contexts=[100]), "give 256 or more"),
        (Asked(candidates=["full"]), "compared with nothing"),
        (Asked(candidates=[WINDOW, WINDOW]), "a candidate twice"),
        (Asked(candidates=["window=3"]), "is no candidate"),
        (Asked(tasks=["niah"]), "there is no task niah; choose from needles"),
        (Asked(margins=["perplexity=5"]), "a number between 0 and 1"),
        (Asked(margins=["speeds=0.1"]), "one of perplexity, score"),
        (Asked(confidence=95), "give 0.5 to 0.999"),
        (Asked(rate=0.0), "sessions per second above 0"),
        (Asked(rate=2.0, concurrency=[8]), "two kinds of load"),
        (Asked(text=Path("/nowhere")), "/nowhere can't be read: No such file"),
    ],
)
def test_what_cant_be_measured_is_refused(asked, sentence):
    with pytest.raises(PlanError, match=sentence):
        make_plan(asked)


def test_durations():
    assert [budget(Asked(), words) for words in ("90", "45s", "5m", "1h30m", None)] == [
        90,
        45,
        300,
        5400,
        300,
    ]
    for words in ("", "5", "m", "1d", "-5m", "nan"):
        with pytest.raises(PlanError, match="write it like 90s, 5m or 1h30m"):
            budget(Asked(), words)


def test_presets_and_loads():
    quick, material = make_plan(Asked())
    assert quick.candidates == QUICK.candidates
    assert [(load.context, load.cached) for load in quick.loads] == [
        *((1024, True), (1024, False), (4096, True), (4096, False))
    ]
    assert len(material.text) > 80_000
    whole, _ = make_plan(Asked(preset=WHOLE, concurrency=[8, 1], candidates=[]))
    assert whole.candidates == WHOLE.candidates
    assert [load.concurrency for load in whole.loads[:3]] == [8, 1, 1], "the operator's first load decides"
    rated, _ = make_plan(Asked(rate=2.0, candidates=[WINDOW, "full"]))
    assert rated.candidates[0] == FULL
    assert len(rated.candidates) == 2
    assert {load.rate for load in rated.loads} == {2.0}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run on the default model, with questions of one's own; ends when its minute and a half is over."""
    folder = tmp_path_factory.mktemp("compare")
    questions = folder / "questions.jsonl"
    questions.write_text(
        '{"prompt": "What is the capital of Japan?", "contains": "Tokyo"}\n{"prompt": "Name a river."}\n'
    )
    done = subprocess.run(
        [
            *COMMAND,
            *("--context", "512", "--candidate", WINDOW, "--candidate", "flash", "--task", "needles"),
            *("--questions", str(questions), "--budget", "90", "--json", str(folder / "c.json")),
            *("--html", str(folder / "c.html"), "--csv", str(folder / "csv"), "--", "--threads", "1"),
        ],
        capture_output=True,
        text=True,
    )
    return folder, done


@pytest.mark.timeout(280)
def test_a_run_on_the_default_model(measured):
    folder, done = measured
    assert done.returncode == 0, done.stderr
    comparison = document.load(folder / "c.json")
    assert comparison.spent < 100
    names = [candidate.name for candidate in comparison.plan.candidates]
    assert names == ["full", WINDOW, "flash"]
    assert not comparison.failed
    for name in names:
        assert comparison.running[name]["kernel"]
        assert any(row.score >= 0 for row in comparison.answers if row.deployment == name)
        assert {row.task for row in comparison.answers if row.deployment == name} == {"needles", "own"}
        assert any(len(block.logprobs) == 64 for block in comparison.text if block.deployment == name)
        assert any(cell.figures["tpot"] > 0 for cell in comparison.speed if cell.deployment == name)
    assert not [row.error for row in comparison.answers if row.error]
    held = {row.deployment: row.bytes for row in comparison.memory}
    assert held[WINDOW] < held["full"] / 3
    window, flash = judge(comparison).verdicts
    text = {
        test.deployment: test
        for verdict in (window, flash)
        for test in verdict.evidence
        if test.measure == "text"
    }
    assert text[WINDOW].loss.value > 0.02, "a window of 128 in 512 tokens costs perplexity"
    assert abs(text["flash"].loss.value) < 0.02, "flash computes what full does"
    assert window.outcome is not Outcome.SAFE
    assert flash.exact
    assert "full" in done.stdout
    assert WINDOW.split()[0] in done.stdout
    page = (folder / "c.html").read_text()
    assert "sliding_window" in page
    assert {file.name for file in (folder / "csv").iterdir()} >= {"answers.csv", "text.csv", "speed.csv"}


@pytest.mark.timeout(280)
def test_a_result_is_shown_again(measured):
    folder, done = measured
    shown = subprocess.run([*COMMAND, "--show", str(folder / "c.json")], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=2048)


def start(folder, tiny, *more, budget="120"):
    """A comparison of a random model, which takes little time."""
    command = [
        *COMMAND,
        "--model",
        str(tiny),
        "--context",
        "1024",
        "--candidate",
        WINDOW,
        "--task",
        "passkey",
    ]
    command += ["--budget", budget, "--json", str(folder / "c.json"), *more]
    command += ["--", "--threads", "1", "--kv-memory", "64MiB", "--weights", "float"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def servers(process, word):
    """Processes of `longspan serve` whose command line has this word."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            line = child.cmdline()
        except psutil.Error:
            continue
        if "serve" in line and word in line:
            found.append(child)
    return found


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.1)


def has_rows(process, file):
    assert process.poll() is None, process.stderr.read()
    return file.exists() and len(json.loads(file.read_text())["answers"]) > 0


@pytest.mark.timeout(280)
def test_a_variant_that_fails_is_named_and_an_interrupted_run_goes_on(tmp_path, tiny):
    process = start(tmp_path, tiny)
    try:
        wait_for(lambda: has_rows(process, tmp_path / "c.json"))
        (server,) = [child for child in servers(process, "sliding_window") if child.ppid() == process.pid]
        server.kill()
        _, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 1, errors
    comparison = document.load(tmp_path / "c.json")
    assert list(comparison.failed) == [WINDOW]
    assert judge(comparison).verdicts[0].outcome is Outcome.UNKNOWN
    # Its server has gone, and so have those that it started.
    assert not psutil.pid_exists(process.pid)


@pytest.mark.timeout(280)
def test_ctrl_c_keeps_what_there_is_and_the_same_command_goes_on(tmp_path, tiny):
    process = start(tmp_path, tiny)
    try:
        wait_for(lambda: has_rows(process, tmp_path / "c.json"))
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "the same command goes on from" in errors
    assert "1k, 1 user, cached prompts" in shown, "what there is so far"
    wait_for(lambda: not any(child.is_running() for child in children), 30)
    before = document.load(tmp_path / "c.json")
    again = start(tmp_path, tiny, budget="30")
    try:
        _, errors = again.communicate(timeout=150)
    finally:
        again.kill()
    assert again.returncode == 0, errors
    after = document.load(tmp_path / "c.json")
    assert after.spent > before.spent
    assert after.answers[: len(before.answers)] == before.answers
    assert judge(after).verdicts[0].outcome is not Outcome.SAFE, "a random model tells nothing"
    assert after.plan == before.plan


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--html", "nowhere/r.html"], "there is no folder nowhere; make it first"),
        (["--json", "."], "is a folder; name a file"),
        (["--csv", "c.json"], "is a file; name a folder"),
        (["--context", "4q"], "write it like 1024,8192 or 1k,8k"),
        (["--task", "needles,nix"], "there is no task nix;"),
        (["--show", "c.json", "--model", "x"], "--show measures nothing; leave out --model"),
        (["--show", "c.json", "--margin", "score=2"], "a number between 0 and 1"),
    ],
)
def test_options_are_refused_before_anything_starts(tmp_path, options, sentence):
    drawn = draw(1, Sizes(blocks=6, contexts=2, turns=3, rounds=2))
    document.save(drawn, tmp_path / "c.json")
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert "starting" not in done.stderr


def test_a_result_is_judged_by_other_margins(tmp_path):
    document.save(draw(1, Sizes()), tmp_path / "c.json")

    def shown(*more):
        done = subprocess.run(
            [*COMMAND, "--show", str(tmp_path / "c.json"), *more], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "margin 1.05" in shown()
    wider = shown("--margin", "perplexity=0.5", "--confidence", "0.9")
    assert "margin 1.5" in wider
    assert "at 90% confidence." in wider
