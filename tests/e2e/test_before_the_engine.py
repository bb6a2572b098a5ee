"""``longspan serve`` before it has an engine: refusals, and Ctrl-C in its first second."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from attention.kernels.cpu import levels
from server.checks import hint, names_refusal
from server.engine.ipc import spawn
from tests.command import longspan
from tests.packages import install
from tests.processes import wait_ended

SERVE = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--metrics-port", "0"]
EXECUTABLE = [level.name for level in levels.executable()]
# No processor executes all of them.
BEYOND = next(level.name for level in levels.LEVELS if level.name not in EXECUTABLE)


def engines(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children():
        try:
            if "server.engine.ipc.process" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """None may be started."""

    def spawn_engine(*_: object) -> None:
        raise AssertionError("an engine is started")

    monkeypatch.setattr(spawn, "spawn_engine", spawn_engine)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--attention", "topk"],
            "did you mean --attention sparse --attention-option pattern=topk?",
        ),
        (["--attention", "sliding_window", "--attention-option", "windo=3"], "has no option 'windo'"),
        (["--kernel", "spda"], "did you mean sdpa"),
        (["--host", "0.0.0.0"], "without TLS and showing who they are; give --tls-certificate and --tls-key"),
        (["--identities", "/nowhere.toml"], "--identities /nowhere.toml can't be read"),
        (["--tls-key", "x.key"], "--tls-key needs --tls-certificate"),
        (
            ["--native-level", BEYOND],
            f"choose auto or one that this processor executes: {', '.join(EXECUTABLE)}",
        ),
    ],
)
def test_options_that_need_no_model_are_refused_before_an_engine(
    arguments: list[str], sentence: str, no_engine: None
) -> None:
    # A model that is not there: were it looked for first, that would be the sentence.
    done = longspan("serve", "--model", "/nowhere", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("longspan: ")
    assert sentence in line


def test_a_process_that_refuses_its_options_has_started_no_other() -> None:
    with subprocess.Popen([*SERVE, "--kernel", "spda"], stderr=subprocess.PIPE, text=True) as process:
        parent = psutil.Process(process.pid)
        seen = []
        while process.poll() is None:
            try:
                seen += parent.children()
            except psutil.NoSuchProcess:
                break
            time.sleep(0.01)
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait(60) == 2
    assert seen == []
    (line,) = errors.splitlines()
    assert "did you mean sdpa" in line


def test_the_check_of_every_own_pattern_takes_no_torch() -> None:
    # In a process of its own, since this one has torch.
    program = (
        "import sys; from server.checks import names_refusal; "
        "from attention.names import BACKENDS; from attention.patterns.declared import SPARSE; "
        "asked = [(name, {}) for name, entry in BACKENDS.items() if not entry.family]; "
        "asked += [('sparse', {'pattern': name}) for name in SPARSE]; "
        "print([names_refusal(name, options, 'auto') for name, options in asked]); "
        "print(names_refusal('sparse', {'pattern': 'topk', 'budge': '1'}, 'auto')); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    accepted, refused = done.stdout.splitlines()
    assert accepted == str([None] * 10)
    assert refused.startswith("topk has no option 'budge'; its options are budget, sink_pages")


def test_backends_of_packages_are_checked_too(
    tmp_path: Path, no_engine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "from attention import Backend\n\nBACKEND = Backend(dict)\n"
    install(tmp_path, "acme", {"longspan.backends": {"acme": "acme:BACKEND"}}, module)
    monkeypatch.syspath_prepend(tmp_path)
    # It is checked in a process of its own, which needs torch.
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    asked = ("serve", "--model", "/nowhere", "--attention", "acme")
    done = longspan(*asked, environment={"PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (2, "")
    assert "backend acme of acme 1.0 makes dict, not an attention.patterns.base.Pattern" in done.stderr


def test_other_names_of_a_pattern_are_known() -> None:
    assert hint("window") == "--attention sliding_window"
    assert hint("streaming") == "--attention sliding_window --attention-option positions=cache"
    assert hint("bigbird") == "--attention sparse --attention-option pattern=bigbird"
    assert hint("full") is hint("psychic") is None
    assert names_refusal("sparse", {"pattern": "topk"}, "auto") is None
    assert names_refusal("sliding_window", {"window": "64"}, "sdpa") is None
    assert "does not compute sliding_window attention" in (
        names_refusal("sliding_window", {}, "varlen") or ""
    )


@pytest.mark.stress
def test_ctrl_c_at_any_moment_ends_it_with_its_code(default_model: object) -> None:
    rng = random.Random(1)
    for _ in range(20):
        with subprocess.Popen(
            SERVE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            time.sleep(rng.uniform(0.3, 5))
            started = psutil.Process(process.pid).children()
            os.killpg(process.pid, signal.SIGINT)
            out, errors = process.communicate(timeout=30)
        assert process.returncode == (0 if "ready" in out else 130), errors
        assert "FATAL" not in errors
        assert "Traceback" not in errors
        assert psutil.wait_procs(started, timeout=10)[1] == []


def test_leaving_writes_what_was_said_and_runs_nothing_else() -> None:
    program = (
        "import atexit, sys; from server.cli.signals import leave; atexit.register(print, 'at exit');"
        "print('said', end=''); print('error', end='', file=sys.stderr); leave(7)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "said", "error")


@pytest.mark.parametrize("whole_group", [True, False], ids=["as a terminal does", "only the server"])
def test_ctrl_c_in_the_first_second_says_nothing(whole_group: bool) -> None:
    with subprocess.Popen(
        [*SERVE, "--model", "/nowhere"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        parent = psutil.Process(process.pid)
        while not (started := engines(parent)):
            assert process.poll() is None
            time.sleep(0.005)
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (130, b"", b"")
    psutil.wait_procs(started, timeout=10)
    assert not any(engine.is_running() for engine in started)


COMMANDS = {
    "python -m server.cli": [sys.executable, "-m", "server.cli"],
    "longspan": [str(Path(sys.executable).parent / "longspan")],
}
MOMENTS = (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
# Files of a traceback; that of the entry point has a few instructions before Ctrl-C is handled.
OURS = re.compile(r'File ".*/(attention|loadtest|longspan|server)/(?!cli/(__main__|early)\.py)')


@pytest.mark.parametrize(
    ("command", "seconds"),
    [
        pytest.param(name, seconds, marks=[pytest.mark.stress] if (number + place) % 2 else [])
        for number, name in enumerate(COMMANDS)
        for place, seconds in enumerate(MOMENTS)
    ],
)
def test_ctrl_c_before_it_is_ready_ends_it_quietly(
    command: str, seconds: float, tmp_path: Path, tiny: Path
) -> None:
    # Weights that are packed anew, so that after a second no machine is ready.
    arguments = ["--model", str(tiny), "--weights", "int8", "--cache-dir", str(tmp_path), "--threads", "1"]
    with subprocess.Popen(
        [*COMMANDS[command], "serve", "--port", "0", "--metrics-port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert "Longspan is ready" not in out
    if process.returncode != 130 and not OURS.search(errors):
        # It was before Longspan's first line. Python itself tells of that, or the system.
        assert process.returncode == -signal.SIGINT or "KeyboardInterrupt" in errors
        return
    assert "Traceback" not in errors
    assert process.returncode == 130


@pytest.mark.parametrize("module", ["server.cli", "loadtest.cli"])
def test_sigterm_ends_it_as_documented_from_its_first_line_on(module: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", module, "serve", "--model", "/nowhere"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        assert any("server.cli.early" in line for line in lines)
        next(lines)  # of the first import after the handlers are there
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert process.returncode == 0
    assert not any("server.engine.ipc.spawn" in line for line in rest), "it went on"


@pytest.mark.parametrize("seconds", [0.0, pytest.param(0.1, marks=pytest.mark.stress)])
def test_sigterm_while_the_engine_process_starts_leaves_none(seconds: float) -> None:
    with subprocess.Popen(
        [*SERVE, "--model", "/nowhere"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        parent = psutil.Process(process.pid)
        while not (started := engines(parent)):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 0
    for engine in started:
        wait_ended(engine, 5)
