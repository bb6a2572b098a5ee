"""``longspan compare`` and ``load`` with odd options and files, and signals."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from loadtest import document
from loadtest.cli.compare_progress import Watcher
from loadtest.compare import document as compare_document
from loadtest.compare.estimate import Needs
from loadtest.compare.group import Listener
from loadtest.compare.judge import judge
from loadtest.compare.plan import Asked, Material, PlanError, make_plan
from loadtest.compare.preflight import Found, try_all
from loadtest.compare.presets import KNOWN
from loadtest.compare.run import run
from loadtest.compare.types import Comparison
from loadtest.deployment import Deployment
from loadtest.load.sharegpt_file import _entries
from loadtest.load.workloads import Shape, WorkloadError, from_file
from loadtest.servers import NotStartedError, serve
from loadtest.tasks import own
from tests.command import longspan

pytestmark = pytest.mark.long

LONGSPAN = [sys.executable, "-m", "loadtest.cli"]


@pytest.fixture(scope="module")
def arguments(tiny_packed):
    return [*tiny_packed, "--kv-memory", "8MiB"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Asked(candidates=["sliding_window window='5"]), "the candidate .* can't be read: No closing quot"),
        (Asked(candidates=["sliding_window window=5 window=6"]), "gives an option twice"),
        (Asked(candidates=["sliding_window window=5", "sliding_window  window=5"]), "a candidate twice"),
        (Asked(candidates=["a x=1 y=2", "a y=2 x=1"]), "a candidate twice"),
        (Asked(rate=float("inf")), "--rate inf is not a load"),
        (Asked(arguments=["--attention", "sparse"]), "--attention after -- .* --candidate"),
        (Asked(arguments=["--port=1"]), "--port after -- .* a free port"),
        (Asked(model="a", arguments=["--model", "b"]), "give --model once"),
        (Asked(preset=KNOWN, chat=False), "leave out --chat"),
    ],
)
def test_options_that_would_be_lost_or_clash_are_refused(asked, sentence):
    with pytest.raises(PlanError, match=sentence):
        make_plan(asked)


def test_users_that_are_named_twice_are_measured_once():
    plan, _ = make_plan(Asked(concurrency=[8, 8]))
    labels = [load.label for load in plan.loads]
    assert len(set(labels)) == len(labels) == len(plan.contexts)


@pytest.mark.parametrize("line", ['{"prompt": "\\ud800"}', '{"prompt": "a", "contains": "\\udfff"}'])
def test_a_question_that_no_message_can_hold_is_refused(tmp_path, line):
    file = tmp_path / "questions.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=r"line 1: it has half a character"):
        own.read(file)


@pytest.mark.parametrize(
    ("read", "text", "sentence"),
    [
        (from_file, "[" * 100_000, "line 1: is not JSON"),
        (from_file, '{"prompt": "\\ud800"}', "line 1: has half a character"),
        (lambda path, shape: list(_entries(path, path.open())), "[" * 100_000, "entry 1: is not JSON"),
    ],
)
def test_a_workload_that_no_message_can_hold_is_refused(tmp_path, read, text, sentence):
    file = tmp_path / "workload"
    file.write_text(text)
    with pytest.raises(WorkloadError, match=sentence):
        read(file, Shape(1, 0, 100, 8, 8))


def test_places_that_cant_be_written_are_refused(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    assert not document.refusal(tmp_path / "new.json")
    assert not document.refusal(tmp_path / "new" / "folder", folder=True)
    assert "No such file" in document.refusal(tmp_path / "missing" / "c.json")
    assert "is a folder" in document.refusal(tmp_path)
    assert "can't be written" in document.refusal(taken, folder=True)
    assert "can't be written" in document.refusal(tmp_path / "c\udcff.json")
    assert sorted(os.listdir(tmp_path)) == ["new", "taken"], "nothing is left of the trial"


def test_a_compare_that_could_not_be_kept_is_refused_before_a_server_starts(tmp_path):
    damaged = tmp_path / "c.json"
    damaged.write_text("[" * 100_000)
    for options, sentence in (
        (["--json", str(tmp_path / "no" / "c.json"), "--html", str(tmp_path)], "there is no folder"),
        (["--json", str(damaged)], "can't be read"),
    ):
        done = longspan("compare", "--model", "/nowhere", *options)
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr
        assert "nowhere" not in done.stderr
        assert "Traceback" not in done.stderr


def test_a_server_that_does_not_start_is_quoted_without_its_log(arguments):
    wrong = (*arguments, "--kv-memory", "8KiB")
    with pytest.raises(NotStartedError) as caught, serve(*wrong):
        pass
    start, why = str(caught.value).split(" did not start: ")
    assert start == f"longspan serve {' '.join(wrong)}"
    assert why.startswith("8 KiB of KV cache hold")
    assert "INFO" not in why


def test_all_groups_are_tried_before_one_is_measured(arguments):
    wrong = [Deployment("odd", "sparse", {"x": "1"}), Deployment("none", "nonsense")]
    with pytest.raises(PlanError) as caught:
        try_all([(wrong[0],), (wrong[1],)], arguments, None, lambda words: None)
    assert "odd: " in str(caught.value)
    assert "none: " in str(caught.value)


def test_a_signal_ends_servers_that_are_still_starting(tiny, tmp_path):
    command = [*LONGSPAN, "compare", "--model", str(tiny), "--context", "512", "--task", "niah_single_1"]
    with subprocess.Popen(
        [*command, "--candidate", "sliding_window window=64", "--budget", "60s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children(recursive=True)):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "interrupted before anything was measured" in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.parametrize("ready", [False, True], ids=["starting", "ready"])
def test_servers_end_with_a_command_that_is_killed(tiny_packed, ready):
    program = (
        "import sys, time\n"
        "from loadtest.deployment import FULL\n"
        "from loadtest.measuring.servers import open_all\n"
        "with open_all([FULL], sys.argv[1:], 1 << 20) as opened:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, *tiny_packed], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            own, end = psutil.Process(process.pid), time.monotonic() + 60
            while len(children := own.children(recursive=True)) < 2:
                assert time.monotonic() < end
                time.sleep(0.02)
            if ready:
                assert process.stdout.readline() == b"ready\n"
                children = own.children(recursive=True)
                assert len(children) == 3, "a server, its engine and what renders its chat templates"
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert not alive


def comparison():
    plan, _ = make_plan(Asked(contexts=[512], tasks=["niah_single_1"]))
    return Comparison(plan, "2030-01-01T00:00:00+00:00", {})


def test_two_runs_of_one_file_lose_nothing_of_each_other(tmp_path, capsys):
    file = tmp_path / "c.json"
    with Watcher(60, file, live=False) as watcher:
        watcher.watch(comparison())
        assert not watcher.keep()
        other = replace(comparison(), created="another run")
        compare_document.save(other, file)
        assert not watcher.keep()
        assert not watcher.keep()
    assert compare_document.load(file).created == "another run"
    (mine,) = tmp_path.glob("c.*.json")
    assert compare_document.load(mine).created == comparison().created
    assert capsys.readouterr().err.count("another run writes") == 1


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    file = tmp_path / "c.json"
    judgment = judge(comparison())
    now = [0.0]
    with Watcher(60, file, live=False, clock=lambda: now[0]) as watcher:
        watcher.watch(comparison())
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            watcher.listener.judged(judgment)
            assert "can't be written" in watcher.keep()
        now[0] = 20.0
        watcher.listener.judged(judgment)
    assert compare_document.load(file).created == comparison().created


def test_paths_are_no_markup(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Watcher(60, None, live=False) as watcher:
        watcher.doing("text: /tmp/[/x].txt")


def test_a_page_tells_the_current_step_between_judgments():
    with Watcher(60, None, live=True) as watcher:
        watcher.watch(comparison())
        watcher.doing("before anything was judged")
        watcher.listener.judged(judge(comparison()))
        page = watcher._live
        version = page.after(-1)["version"]
        watcher.listener.doing("4k, round 3")
        update = page.after(version)
    assert "4k, round 3" in update["progress"]
    assert "html" not in update


def test_no_server_is_started_when_the_time_is_over(monkeypatch):
    def started(*_):
        raise AssertionError("a server was started")

    monkeypatch.setattr("loadtest.compare.run.open_all", started)
    found = Found(comparison().plan, {}, {}, None, 8, Needs(0, 0, 0, 0))
    run(comparison(), found, Material("", "", (), None), 5.0, Listener(str, str), lambda: 6.0)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    report = tmp_path / "report.html"
    report.write_text("of yesterday")
    disk = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, disk[1]))
        with pytest.raises(OSError, match="too large"):
            document.write("x" * 10_000, report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, disk)
    assert report.read_text() == "of yesterday"
    assert os.listdir(tmp_path) == [report.name]
