"""Plans that are measured, on a real gRPC server with a scripted engine and a double of an HTTP endpoint."""

import asyncio
import io
import itertools
import os
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.cli.application import application
from loadtest.load import cell, driver, examine, reconcile, result
from loadtest.load.cell import StoppedError
from loadtest.load.document import save
from loadtest.load.measure import STOPPED, measure
from loadtest.load.passes import NotMeasuredError, one_pass
from loadtest.load.plan import Plan
from loadtest.load.rows import clean, rows
from loadtest.load.targets import Endpoint, EndpointError
from loadtest.load.types import ClosedLoop, OpenLoop, Targets, Turn
from loadtest.load.workloads import WORKLOADS, Shape
from loadtest.measuring.listening import processes_on
from loadtest.measuring.types import CannotMeasureError, Weather
from loadtest.measuring.weather import Observed
from tests.loadtest import openai_double


@pytest.fixture(scope="module")
def peer():
    with openai_double.running() as address:
        yield Endpoint(address, "plain", "peer")


def both(port, peer, **fields):
    """A plan for two loads on a server and an endpoint."""
    usual = {
        "host": "127.0.0.1",
        "port": port,
        "metrics_url": None,
        "workload": {"name": "fixed"},
        "draw": lambda count, seed: WORKLOADS["fixed"](Shape(count, 9, 6, 250, 200, seed)),
        "loads": [ClosedLoop(1), ClosedLoop(2)],
        "sessions": 3,
        "warmup": 0,
        "workers": 1,
        "seed": 7,
        "most_seconds": None,
        "targets": None,
        "endpoint": peer,
    }
    return Plan(**{**usual, **fields})


def quietly(plan, *observe):
    return measure(plan, Console(file=io.StringIO()), *observe)


def watching(*weathers):
    """Tells of each measurement in turn how much of the machine others used."""
    left = list(weathers)

    def observe(pids, idle):
        assert os.getpid() in pids or os.getpid() in idle
        return lambda: Observed(Weather(foreign=left.pop(0) if left else 0.0), 10.0, "PID 9 other")

    return observe


async def test_a_measurement_agrees_with_the_servers_metrics(served, tmp_path):
    running, port, metrics_port = served
    plan = both(
        port,
        None,
        metrics_url=f"http://127.0.0.1:{metrics_port}/metrics",
        loads=[ClosedLoop(2), OpenLoop(100.0)],
        sessions=10,
        warmup=None,
        targets=Targets(ttft=10.0),
    )
    found = await asyncio.to_thread(quietly, plan)
    assert [run.load_label for run in found.runs] == ["2 users", "100/s"]
    for run in found.runs:
        assert run.server is not None
        assert (run.server.requests, run.server.output_tokens, run.server.prompt_tokens) == (10, 60, 90)
        assert not [line for line in run.disagreements if "counted" in line]
        assert run.summary.goodput == 1.0
        assert run.device is not None
        # The scripted engine says 1,000 bytes and 3,000 operations per token and step.
        assert (run.device.bytes_moved, run.device.flops, run.device.name) == (60_000, 180_000, "cpu")
        assert 0 < run.device.bandwidth_share < 1
        assert run.device.memory_used == 3e9
        assert len(run.requests) == 10
    assert found.runs[0].warmup == 2
    prompts = [tuple(request.prompt) for request in running.engine.submitted]
    assert len(set(prompts)) == len(prompts), "a run sent a prompt of an earlier one"
    save(found, tmp_path / "result.json")
    assert result.load(tmp_path / "result.json").runs[1].load == {
        "kind": "open",
        "rate": 100.0,
        "burstiness": 1.0,
    }


async def test_repeats_go_there_and_back_with_prompts_that_no_run_has_met(served, peer):
    running, port, _ = served
    before = len(openai_double.received(peer.url))
    found = await asyncio.to_thread(quietly, both(port, peer, repeats=3), watching())
    order = [(run.repeat, run.label) for run in found.runs]
    one, two = "1 user", "2 users"
    there = [one, f"{one}, peer", f"{two}, peer", two]
    assert order == [
        *((0, label) for label in there),
        *((1, label) for label in there[::-1]),
        *((2, label) for label in there[::-1]),
    ]
    assert [row.label for row in rows(found)] == [one, f"{one}, peer", f"{two}, peer", two]
    ours = [tuple(request.prompt) for request in running.engine.submitted]
    theirs = [tuple(body["prompt"]) for body in openai_double.received(peer.url)[before:]]
    assert len(set(ours)) == len(ours) == 3 * 2 * 3
    assert sorted(theirs) == sorted(ours), "both targets get the same prompts"
    assert {run.seed for run in found.runs if run.target == "peer"} == {
        run.seed for run in found.runs if run.target == "longspan"
    }
    assert found.peers["peer"]["model"] == "plain"
    assert all(run.summary.output_tokens == 18 for run in found.runs)
    assert {run.weather.foreign for run in found.runs} == {0.0}


async def test_a_disturbed_run_is_measured_again_where_there_are_repeats(served, peer):
    _, port, _ = served
    plan = both(port, None, loads=[ClosedLoop(1)], repeats=2)
    found = await asyncio.to_thread(quietly, plan, watching(0.5, 0.6))
    assert [(run.repeat, run.attempt, bool(run.disturbed)) for run in found.runs] == [
        *((0, 0, True), (0, 1, True), (0, 2, False), (1, 0, False)),
    ]
    (row,) = rows(found)
    assert len(row.runs) == 2
    assert "PID 9 other" in found.runs[0].disturbed
    hopeless = await asyncio.to_thread(quietly, replace(plan, repeats=3), watching(*[0.5] * 9))
    assert [(run.repeat, run.attempt) for run in hopeless.runs] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    once = await asyncio.to_thread(quietly, both(port, None, loads=[ClosedLoop(1)]), watching(0.5))
    assert [bool(run.disturbed) for run in once.runs] == [True]
    assert not clean(once)


async def test_a_server_whose_processes_cannot_be_told_is_not_watched(served, peer, monkeypatch):
    _, port, _ = served
    monkeypatch.setattr(cell, "processes_on", lambda port: ())
    plan = both(port, None, loads=[ClosedLoop(1)], repeats=2)
    found = await asyncio.to_thread(quietly, plan, lambda pids, idle: watching(0.9)([os.getpid()], idle))
    assert [(run.repeat, run.weather, run.disturbed) for run in found.runs] == [(0, None, ""), (1, None, "")]
    assert "was not watched" in found.notes[0]


@pytest.mark.parametrize(
    ("local", "why"), [(False, "the machine of peer was not watched"), (True, "while peer was measured")]
)
async def test_a_peer_that_cannot_be_watched_leaves_the_server_watched(served, peer, monkeypatch, local, why):
    _, port, _ = served
    monkeypatch.setattr(
        cell, "processes_on", lambda listening: processes_on(port) if listening == port else ()
    )
    monkeypatch.setattr(Endpoint, "local", local)
    plan = both(port, peer, loads=[ClosedLoop(1)], repeats=2)
    found = await asyncio.to_thread(quietly, plan, watching(0.5, 0.0))
    assert [(run.target, run.attempt, bool(run.disturbed)) for run in found.runs[:3]] == [
        *(("longspan", 0, True), ("peer", 0, False), ("longspan", 1, False)),
    ]
    assert {run.target for run in found.runs if run.weather is None} == {"peer"}
    (note,) = found.notes
    assert why in note


def test_processes_are_found_by_their_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        assert processes_on(listening.getsockname()[1]) == ()
        listening.listen()
        assert processes_on(listening.getsockname()[1]) == (os.getpid(),)


async def test_an_interrupt_ends_the_plan_and_keeps_its_runs(served, peer):
    running, port, _ = served
    running.engine.step_seconds = 0.05
    done = []

    def stop_in_the_third(*arguments, run=driver.run, **options):
        done.append(options)
        if len(done) == 3:
            raise StoppedError
        return run(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "run", stop_in_the_third)
        plan = both(port, None, loads=[ClosedLoop(1)], repeats=4)
        found = await asyncio.to_thread(quietly, plan, watching())
    assert [run.repeat for run in found.runs] == [0, 1]


async def test_the_command(served, tmp_path):
    _, port, metrics_port = served
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    where = ["--port", str(port), "--metrics-port", str(metrics_port)]
    sizes = ["--prompt-tokens", "9", "--output-tokens", "6", "--requests", "8", "--concurrency", "2"]

    def run(*arguments):
        return asyncio.to_thread(CliRunner().invoke, application, ["load", *arguments])

    outcome = await run(*where, *sizes, *files)
    assert outcome.exit_code in (0, 1), outcome.output  # a busy machine may make the run invalid
    assert "2 users" in outcome.stdout
    assert result.load(tmp_path / "r.json").runs[0].summary.requests == 8
    assert "<svg" in (tmp_path / "r.html").read_text()
    shown = await run("--show", str(tmp_path / "r.json"), "--against", str(tmp_path / "r.json"))
    assert "(1.00)" in shown.stdout
    drawn = await run("--show", str(tmp_path / "r.json"), "--svg", str(tmp_path / "r.svg"))
    assert drawn.exit_code in (0, 1)
    assert (tmp_path / "r.svg").read_text().startswith("<svg")
    for arguments, sentence in (
        (["--rate", "3", "--sweep"], "exclude one another"),
        (["--workload", "nope"], "there is no workload 'nope'"),
        (["--prompt-tokens", "300"], "don't fit the model's context of 200"),
        (["--show", str(tmp_path / "none.json")], "none.json can't be read: No such file or directory\n"),
        (["--show", str(tmp_path / "r.json"), "--rate", "2"], "--show measures nothing; leave out --rate"),
        (["--html", str(tmp_path / "no" / "r.html")], "there is no folder"),
        (["--svg", str(tmp_path / "no" / "r.svg")], "there is no folder"),
    ):
        refused = await run(*where, *arguments)
        assert refused.exit_code == 1
        assert sentence in refused.stderr
    for host in ("dns:localhost", "dns:///localhost", "ipv4:127.0.0.1:5"):
        refused = await run("--host", host, "--port", str(port), *sizes)
        assert f"--host {host} is no name of a machine: give --metrics-host" in refused.stderr
    refused = await run("--port", str(port), "--metrics-port", "1", *sizes)
    assert "--metrics-host and --metrics-port, or leave them out with --no-metrics" in refused.stderr


@pytest.mark.parametrize(
    ("failure", "ended"),
    [
        (KeyboardInterrupt(), STOPPED),
        (driver.WorkerDiedError("a client process ended"), "before all was measured: a client process ended"),
    ],
)
async def test_runs_before_the_last_are_kept(served, monkeypatch, tmp_path, failure, ended):
    run, calls = driver.run, itertools.count()

    def failing(*arguments, **options):
        if next(calls) == 1:
            raise failure
        return run(*arguments, **options)

    monkeypatch.setattr(driver, "run", failing)
    found = await asyncio.to_thread(quietly, both(served[1], None))
    assert len(found.runs) == 1
    assert ended in found.ended
    save(found, tmp_path / "l.json")
    assert result.load(tmp_path / "l.json").ended == found.ended
    files = ["--show", str(tmp_path / "l.json"), "--html", str(tmp_path / "l.html")]
    shown = await asyncio.to_thread(CliRunner().invoke, application, ["load", *files])
    assert shown.exit_code == 0, "what is shown was measured before"
    assert ended in " ".join(shown.stderr.split())
    assert ended in (tmp_path / "l.html").read_text()


async def test_a_server_that_hangs_ends_the_plan_which_keeps_its_runs(served):
    running, port, metrics_port = served
    plan = both(port, None, metrics_url=f"http://127.0.0.1:{metrics_port}/metrics", patience=0.5)
    found = await asyncio.to_thread(quietly, replace(plan, loads=[ClosedLoop(2)]))
    assert not found.ended
    running.engine.open.clear()
    found = await asyncio.to_thread(quietly, plan)
    (run,) = found.runs
    assert run.summary.failed == {"NO_MESSAGE": 1}
    assert "1 user: the server sent nothing for 0.5 seconds while requests waited" in found.ended
    with pytest.raises(NotMeasuredError, match=r"sent nothing for 0\.5 seconds"):  # in the warm-up
        await asyncio.to_thread(quietly, replace(plan, warmup=1))


async def test_a_run_is_kept_whose_metrics_can_be_read_no_more(served, monkeypatch):
    _, port, metrics_port = served
    plan = both(port, None, metrics_url=f"http://127.0.0.1:{metrics_port}/metrics")
    for failure, ended in ((reconcile.ScrapeError("gone"), "gone"), (KeyboardInterrupt(), STOPPED)):

        def failing(*arguments, failure=failure):
            raise failure

        monkeypatch.setattr(cell, "_settled", failing)
        found = await asyncio.to_thread(quietly, plan)
        assert [(run.server, run.summary.requests, run.interrupted) for run in found.runs] == [
            (None, 3, False)
        ]
        assert ended in found.ended


async def test_an_endpoint_that_hangs_is_said():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        silent = Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "m")
        with pytest.raises(EndpointError, match=r"did not answer a request within 0\.5 seconds"):
            await asyncio.to_thread(examine.try_out, silent, Turn([5, 6, 7], 4), 0.5)


async def test_a_first_run_that_fails_is_said(served, monkeypatch):
    def failing(*arguments, **options):
        raise driver.WorkerDiedError("a client process ended")

    monkeypatch.setattr(driver, "run", failing)
    with pytest.raises(driver.WorkerDiedError):
        await asyncio.to_thread(quietly, both(served[1], None))


def test_a_target_that_hangs_lets_no_other_cell_wait_as_long():
    asked = []

    def hanging(load, seed):
        asked.append(seed)
        raise CannotMeasureError("the server sent nothing")

    cells = [SimpleNamespace(name=name, prefix="", pids=None, measure=hanging) for name in ("a", "b")]
    with pytest.raises(NotMeasuredError, match="sent nothing"):
        one_pass(SimpleNamespace(runs=[]), cells, 0, 1)
    assert len(asked) == 1
