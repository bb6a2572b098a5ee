"""``longspan compare`` as a whole: on real servers, on servers that fail, and its refusals."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from loadtest.compare import document
from loadtest.compare.judge import judge
from loadtest.compare.plan import Asked, PlanError, budget, make_plan
from loadtest.compare.presets import QUICK, WHOLE
from loadtest.compare.types import Outcome
from loadtest.deployment import FULL
from loadtest.measuring.statistics import LEAST
from tests.command import longspan
from tests.loadtest.synthetic import Sizes, draw
from tests.models_zoo import save_tiny

pytestmark = pytest.mark.long

WINDOW = "sliding_window window=124 sinks=4"
COMMAND = [sys.executable, "-m", "loadtest.cli", "compare"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Asked(contexts=[100]), "give 256 or more"),
        (Asked(candidates=["full"]), "compared with nothing"),
        (Asked(candidates=[WINDOW, WINDOW]), "a candidate twice"),
        (Asked(candidates=["window=3"]), "is not a candidate"),
        (Asked(tasks=["niah"]), "there is no task niah; choose from needles"),
        (Asked(margins=["perplexity=5"]), "a number between 0 and 1"),
        (Asked(margins=["speeds=0.1"]), "one of perplexity, score"),
        (Asked(confidence=95), "give 0.5 to 0.999"),
        (Asked(rate=0.0), "sessions per second above 0"),
        (Asked(rate=2.0, concurrency=[8]), "two kinds of load"),
        (Asked(text=Path("/nowhere")), "/nowhere can't be read: No such file"),
    ],
)
def test_requests_that_cant_be_measured_are_refused(asked, sentence):
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


def run(folder, budget, task, arguments, *options):
    """The command, with the user's own questions."""
    (folder / "questions.jsonl").write_text(
        '{"prompt": "What is the capital of Japan?", "contains": "Tokyo"}\n{"prompt": "Name a river."}\n'
    )
    more = ["--json", str(folder / "c.json"), "--html", str(folder / "c.html"), "--csv", str(folder / "csv")]
    more += ["--context", "512", "--candidate", WINDOW, "--task", task, *options]
    more += ["--questions", str(folder / "questions.jsonl"), "--budget", budget, "--", *arguments]
    return longspan("compare", *more)


def assert_whole(folder, done, task):
    """A run told something true of every unit; gives the comparison."""
    assert done.returncode == 0, done.stderr
    assert re.search(r"start-up|which intervals take", done.stderr), "the estimate, before it measured"
    comparison = document.load(folder / "c.json")
    names = [candidate.name for candidate in comparison.plan.candidates]
    assert names == ["full", WINDOW]
    assert not comparison.failed
    for name in names:
        assert comparison.running[name]["kernel"]
        own = [row for row in comparison.answers if row.deployment == name]
        assert all(row.score >= 0 for row in own if row.task == task)
        assert {row.task for row in own} == {task, "own"}
        assert any(len(block.logprobs) == 64 for block in comparison.text if block.deployment == name)
        assert any(cell.figures.get("tpot", 0) > 0 for cell in comparison.speed if cell.deployment == name)
    assert not [row.error for row in comparison.answers if row.error]
    held = {row.deployment: row.bytes for row in comparison.memory}
    assert held[WINDOW] < held["full"] / 3
    (window,) = judge(comparison).verdicts
    assert window.likeness[0].same_top.value < 1
    assert window.likeness[0].kl.value > 0
    assert "full" in done.stdout
    assert WINDOW.split()[0] in done.stdout
    page = (folder / "c.html").read_text()
    assert "sliding_window" in page
    assert {file.name for file in (folder / "csv").iterdir()} == {
        *("answers.csv", "text.csv", "speed.csv", "memory.csv")
    }
    return comparison


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tiny_packed):
    """A run on a random model, which only guesses: it ends as soon as there is something of everything.

    The budget is far longer than that takes, however slow or busy the machine is.
    """
    folder = tmp_path_factory.mktemp("compare")
    few_rounds = ("--confidence", "0.5", "--margin", "speed=0.9")
    with pytest.MonkeyPatch.context() as patch:
        # Other work of this machine must not repeat visits or rounds here.
        patch.setattr("loadtest.measuring.weather.disturbance", lambda observed: "")
        patch.setattr("loadtest.measuring.again.MOST_AGAIN", 0)
        patch.setattr("loadtest.compare.group.MOST_ROUNDS", LEAST)
        return folder, run(folder, "40m", "niah_single_1", tiny_packed, *few_rounds)


@pytest.mark.timeout(1000)
def test_a_run(measured):
    folder, done = measured
    assert_whole(folder, done, "niah_single_1")
    assert "full attention itself only guesses" in " ".join(done.stdout.split())


@pytest.mark.timeout(1000)
@pytest.mark.stress  # three minutes; test_a_run is the same on a random model
def test_a_run_on_the_default_model(tmp_path):
    done = run(tmp_path, "3m", "needles", ["--threads", "1"])
    comparison = assert_whole(tmp_path, done, "needles")
    (window,) = judge(comparison).verdicts
    (lost,) = (test.loss for test in window.evidence if test.measure == "text")
    assert lost.value > 0.02, "a window of 128 in 512 tokens costs perplexity"
    assert window.outcome is not Outcome.SAFE


def test_a_result_is_shown_again(measured):
    folder, done = measured
    shown = longspan("compare", "--show", str(folder / "c.json"))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == done.stdout


@contextmanager
def started(folder, model):
    """A comparison of a random model, which takes little time; ended with the block in any case."""
    command = [*COMMAND, "--model", str(model), "--context", "512", "--candidate", WINDOW]
    command += ["--task", "niah_single_1", "--budget", "200", "--json", str(folder / "c.json")]
    command += ["--", "--threads", "1", "--kv-memory", "64MiB", "--weights", "float"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # which ends its servers too


def wait_for(condition, process=None, seconds=240.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        if process is not None and process.poll() is not None:
            pytest.fail(f"the run ended with {process.returncode}: {process.stderr.read()}")
        assert time.monotonic() < end, "it did not get there in time"
        time.sleep(0.1)
    return found


def rows_of(file, name):
    """How many answers and blocks of text of a candidate are kept."""
    if not file.exists():
        return 0
    found = json.loads(file.read_text())
    return sum(row["deployment"] == name for row in [*found["answers"], *found["text"]])


def server_of(process, word):
    """The server that a run started with this word among its arguments."""
    own = psutil.Process(process.pid).children()
    (found,) = [child for child in own if {"serve", word} <= set(child.cmdline())]
    return found


@pytest.mark.timeout(900)
@pytest.mark.stress  # a minute; test_compare_loop has the same with simulated servers
def test_a_variant_that_fails_is_named_and_the_same_command_goes_on_until_ctrl_c(tmp_path):
    model = save_tiny("llama", tmp_path / "tiny", max_position_embeddings=2048)
    file = tmp_path / "c.json"
    with started(tmp_path, model) as process:
        wait_for(lambda: rows_of(file, WINDOW), process)
        children = psutil.Process(process.pid).children(recursive=True)
        server_of(process, "sliding_window").kill()
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    wait_for(lambda: not any(child.is_running() for child in children), seconds=30)
    before = document.load(file)
    assert list(before.failed) == [WINDOW]
    assert judge(before).verdicts[0].outcome is Outcome.UNKNOWN
    kept = [row for row in [*before.answers, *before.text] if not row.error]

    with started(tmp_path, model) as process:
        wait_for(lambda: rows_of(file, WINDOW) > sum(row.deployment == WINDOW for row in kept), process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "512, 1 user, cached prompts" in shown, "what there is so far"
    assert f"the same command goes on from {file}" in " ".join(errors.split())
    wait_for(lambda: not any(child.is_running() for child in children), seconds=30)
    after = document.load(file)
    assert not after.failed
    assert after.spent > before.spent
    assert all(row in [*after.answers, *after.text] for row in kept)
    assert after.plan == before.plan
    assert judge(after).verdicts[0].outcome is not Outcome.SAFE, "a random model tells nothing"


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
def test_options_are_refused_before_anything_starts(tmp_path, monkeypatch, options, sentence):
    drawn = draw(1, Sizes(blocks=6, contexts=2, turns=3, rounds=2))
    document.save(drawn, tmp_path / "c.json")
    monkeypatch.chdir(tmp_path)
    done = longspan("compare", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert "starting" not in done.stderr


def test_a_result_is_judged_by_other_margins(tmp_path):
    document.save(draw(1, Sizes()), tmp_path / "c.json")

    def shown(*more):
        done = longspan("compare", "--show", str(tmp_path / "c.json"), *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "margin 1.05" in shown()
    wider = shown("--margin", "perplexity=0.5", "--confidence", "0.9")
    assert "margin 1.5" in wider
    assert "at 90% confidence." in wider
