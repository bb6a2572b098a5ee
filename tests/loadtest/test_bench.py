"""``make bench`` on a small random model: what is sent, in which order, and what is kept."""

import io

import pytest
from rich.console import Console

from loadtest import bench
from loadtest.bench import Workload
from loadtest.load import result
from loadtest.load.document import save
from loadtest.load.driver import WorkerDiedError
from loadtest.load.workloads import WorkloadError
from loadtest.servers import serve
from tests.models_zoo import CONTEXT, save_tiny

WORKLOADS = (Workload(1, 2, 16, 8), Workload(2, 4, 32, 1), Workload(2, 4, 16, 8))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("bench") / "llama")
    with serve("--no-prefix-cache", "--model", str(folder), "--threads", "1") as address:
        yield address


def test_workloads_are_measured_there_and_back(address, tmp_path, monkeypatch):
    # What else this machine does must not repeat runs here.
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


def test_what_does_not_fit_the_model_is_said(address):
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
    assert WorkerDiedError in bench._FAILURES
