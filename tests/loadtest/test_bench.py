"""``make bench`` on a small random model: its requests, their order, and its document."""

import contextlib
import dataclasses
import io

import psutil
import pytest
from rich.console import Console

from loadtest import bench
from loadtest.bench import Workload
from loadtest.load import cell, driver, result
from loadtest.load.document import save
from loadtest.load.driver import WorkerDiedError
from loadtest.load.measure import STOPPED
from loadtest.load.workloads import WorkloadError
from loadtest.servers import serve
from tests.models_zoo import CONTEXT

plan = bench._plan
WORKLOADS = (Workload(1, 2, 16, 8), Workload(2, 4, 32, 1), Workload(2, 4, 16, 8))


@pytest.fixture(scope="module")
def address(tiny_packed):
    with serve("--no-prefix-cache", *tiny_packed, "--max-context", str(CONTEXT)) as address:
        yield address


def test_workloads_are_measured_there_and_back(address, tmp_path, monkeypatch):
    # Other work of this machine must not repeat runs here.
    monkeypatch.setattr("loadtest.measuring.weather.disturbance", lambda observed: "")
    found = bench.bench(address, WORKLOADS, 2, Console(file=io.StringIO()))
    labels = ["1 user, 16/8", "2 users, 32/1", "2 users, 16/8"]
    assert [run.label for run in found.runs] == labels + labels[::-1]
    assert [run.repeat for run in found.runs] == [0] * 3 + [1] * 3
    assert [run.summary.requests for run in found.runs] == [2, 4, 4, 4, 4, 2]
    assert not any(run.summary.failed for run in found.runs)
    assert all(run.summary.cached_tokens == 0 for run in found.runs)
    assert all(run.weather is not None for run in found.runs)
    assert len({run.seed for run in found.runs}) == 6
    save(found, tmp_path / "bench.json")
    assert [run.label for run in result.load(tmp_path / "bench.json").runs] == labels + labels[::-1]


@pytest.mark.parametrize(("at", "runs"), [("warm-up", 1), ("scrape", 2)])
def test_a_command_that_is_stopped_says_so_and_keeps_its_results(
    address, monkeypatch, tmp_path, capsys, at, runs
):
    """Ctrl-C in the second workload: in its warm-up, or when its metrics are read at its end."""
    drive, scrape = driver.run, cell._settled
    calls = {"drive": 0, "scrape": 0}

    def driving(*arguments, **options):
        calls["drive"] += 1
        outcome = drive(*arguments, **options)
        return outcome._replace(interrupted=True) if (at, calls["drive"]) == ("warm-up", 3) else outcome

    def scraping(*arguments):
        calls["scrape"] += 1
        if (at, calls["scrape"]) == ("scrape", 2):
            raise KeyboardInterrupt
        return scrape(*arguments)

    monkeypatch.setattr(driver, "run", driving)
    monkeypatch.setattr(cell, "_settled", scraping)
    monkeypatch.setattr(bench, "serve", lambda *arguments: contextlib.nullcontext(address))
    monkeypatch.setattr(bench, "WORKLOADS", WORKLOADS)
    file = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(file)])
    assert bench.main() == 130
    told = capsys.readouterr()
    assert STOPPED in told.err
    assert "1 user" in told.out
    kept = result.load(file)
    assert (len(kept.runs), kept.ended) == (runs, STOPPED)


def test_a_server_that_hangs_midway_ends_the_measurement(address, monkeypatch):
    """All its processes are stopped, as under a debugger, while it answers."""
    drive = driver.run
    server = psutil.Process(address.pid)
    stopped = [server, *server.children(recursive=True)]

    def freezing(*arguments, **options):
        def listen(progress):
            for process in stopped if progress.sent else ():
                process.suspend()

        return drive(*arguments, **{**options, "listener": listen})

    monkeypatch.setattr(driver, "run", freezing)
    monkeypatch.setattr("loadtest.load.reconcile._TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(
        bench, "_plan", lambda *given: dataclasses.replace(plan(*given), warmup=0, patience=1.0)
    )
    try:
        found = bench.bench(address, (Workload(2, 64, 16, 64),), 1, Console(file=io.StringIO()))
    finally:
        for process in stopped:
            process.resume()
    assert "NO_MESSAGE" in found.runs[0].summary.failed
    assert "the server sent nothing for 1 seconds" in found.ended


def test_workloads_that_do_not_fit_the_model_are_refused(address):
    with pytest.raises(WorkloadError, match="don't fit the model's context"):
        bench.bench(address, (Workload(1, 1, CONTEXT, 8),), 1, Console(file=io.StringIO()))


def test_a_command_without_a_server_says_why(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--against", "/nowhere"])
    assert bench.main() == 1
    assert "/nowhere" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench", "--rounds", "0"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "not a number above 0" in capsys.readouterr().err
    assert issubclass(WorkerDiedError, bench._FAILURES)
