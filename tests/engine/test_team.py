"""The number of threads follows what the machine gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from server.engine.build import build_engine
from server.engine.cores import usable_cores
from server.engine.team import FIRST_TRIAL, LAST_TRIAL, Result, Team, watched
from server.settings import Settings
from tests.engine.harness import greedy_requests, run


class Machine:
    """Cores of which neighbors take some: threads that wait for each other get what the slowest gets."""

    def __init__(self, cores: int, neighbors: int = 0) -> None:
        self.cores, self.neighbors = cores, neighbors
        self.now = self.busy = 0.0
        self.sizes: list[int] = []
        self.team = Team(cores, self.sizes.append, lambda: self.now, lambda: self.busy)

    def steps(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.team.compute(self._step)

    def _step(self) -> None:
        size = self.team.size
        share = 0.5 if size + self.neighbors > self.cores else 0.98
        self.now += 0.004
        self.busy += size * share * 0.004


@pytest.mark.parametrize("neighbors", [1, 3])
def test_threads_leave_cores_to_neighbors_and_take_them_back(neighbors: int) -> None:
    machine = Machine(8)
    machine.steps(5)
    assert machine.sizes == []
    machine.neighbors = neighbors
    machine.steps(1)
    assert machine.team.size == 8 - neighbors
    machine.neighbors = 0
    machine.steps((neighbors + 1) * (FIRST_TRIAL + 0.3))
    assert machine.team.size == 8


def test_vain_trials_become_rare() -> None:
    machine = Machine(2, neighbors=1)
    machine.steps(1000)
    trials = machine.sizes.count(2)
    assert 1000 / LAST_TRIAL / 2 < trials < 1000 / LAST_TRIAL + 10
    assert machine.team.size == 1


def test_one_thread_stays() -> None:
    machine = Machine(2, neighbors=2)
    machine.steps(100)
    assert min(machine.sizes) == 1


def test_a_failed_step_is_watched_too() -> None:
    machine = Machine(2)

    def fails() -> None:
        machine.now += 1
        machine.busy += 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        machine.team.compute(fails)
    assert machine.sizes == [1]


def test_threads_that_sleep_while_they_wait_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert watched(2) is None
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert watched(1) is None
    assert watched(2) is not None


V2, V1 = "0::/pod/ours", "3:cpu,cpuacct:/pod/ours"


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("", {}, 4),
        (V2, {}, 4),
        (V2, {"cpu.max": "max 100000"}, 4),
        (V2, {"cpu.max": "250000 100000"}, 2),
        (V2, {"pod/cpu.max": "300000 100000", "pod/ours/cpu.max": "max 100000"}, 3),
        (V2, {"pod/ours/cpu.max": "50000 100000"}, 1),
        (V2, {"cpu.max": "900000 100000"}, 4),
        (V2, {"cpu.max": "nonsense"}, 4),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "300000", "cpu/pod/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_a_quota_bounds_the_cores(
    group: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    (tmp_path / "groups").write_text(group)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cores(tmp_path / "groups", tmp_path) == cores


@pytest.fixture
def threads() -> Iterator[int]:
    """As many as torch had before, also after the test."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


class Restless(Team):
    """Another number of threads for every step."""

    def compute(self, step: Callable[[], Result]) -> Result:
        self._set(self.size % 3 + 1)
        return step()


def test_the_number_of_threads_changes_no_step(default_model: Path, threads: int) -> None:
    settings = Settings(threads=3, kv_memory="64MiB", prefix_cache=False)
    core, _ = build_engine(settings, default_model, lambda stage, fraction: None)
    requests = greedy_requests([list(range(100, 100 + n)) for n in (5, 40, 150)], 8, logprobs=2)
    core.team = None
    expected = run(core, requests)
    core.team = Restless(3)
    found = run(core, requests)
    for number, outcome in expected.items():
        assert found[number].tokens == outcome.tokens
        ours, theirs = (
            [one.logprob for each in some.logprobs for one in (each.chosen, *each.top)]
            for some in (found[number], outcome)
        )
        # Their logarithms are torch's, whose sums over the vocabulary depend on the number of threads.
        assert ours == pytest.approx(theirs, abs=1e-5)
