"""The validation of simulated replicas: error or noise, and rounds that go on in a file."""

import json
import math
import random
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

from loadtest.direct.scale import validation
from loadtest.direct.scale.__main__ import _kept, main
from loadtest.direct.scale.calibrate import at_once
from loadtest.direct.scale.errors import BOUND, JUDGED, NO, OPEN, YES, Pair, error, report, verdict
from loadtest.direct.scale.simulate import simulate
from loadtest.direct.scale.traffic import Figures
from loadtest.direct.scale.validation import ROWS, Kept, add_rounds, scenario_of
from tests.loadtest.test_scale import COSTS


def figures(rate, ttft=0.5, hits=0.0):
    """Of one run."""
    return Figures(rate, ttft, ttft / 2, 2 * ttft, 3 * ttft, hits, 100, 4 / rate)


def pairs(count, ratio, noise, prompts=0.0, seed=0):
    """Runs whose rates go with their prompts, simulated ones so many times as high but for noise."""
    rng = random.Random(seed)
    rates = [100 * math.exp(rng.gauss(0, prompts)) for _ in range(count)]
    return [Pair(figures(rate), figures(rate * ratio * math.exp(rng.gauss(0, noise)))) for rate in rates]


def test_an_error_is_told_from_noise():
    assert verdict(error("rate", pairs(6, 1.04, 0.03))) == YES
    assert verdict(error("rate", pairs(6, 1.4, 0.03))) == verdict(error("rate", pairs(6, 0.7, 0.03))) == NO
    assert verdict(error("rate", pairs(6, 1.04, 0.4))) == verdict(error("rate", pairs(6, 1.16, 0.04))) == OPEN
    assert verdict(error("rate", pairs(5, 1.0, 0.01))) == OPEN
    nothing = [Pair(figures(100), figures(100, hits=0.4))]
    assert verdict(error("hits", nothing * 6)) == NO
    assert verdict(error("hits", nothing * 5)) == OPEN
    found = error("rate", pairs(6, 1.04, 0.03))
    assert found.low < found.value < found.high
    # What both have of their prompts is no error.
    assert verdict(error("rate", pairs(6, 1.04, 0.03, prompts=0.5))) == YES


def test_what_is_off_by_the_bound_rarely_passes():
    """By 15% exactly: one in forty would pass, 25 of 1,000 with a standard deviation of 5."""
    for ratio in (1 + BOUND, 1 - BOUND):
        passed = sum(verdict(error("rate", pairs(8, ratio, 0.06, 0.1, seed))) == YES for seed in range(1000))
        assert 5 <= passed <= 45


def test_the_table_shows_noise_and_errors(capsys):
    scenario = scenario_of(0, 1)
    assert report([(scenario, pairs(6, 1.04, 0.03))])
    shown = capsys.readouterr().out
    first = next(
        line for line in shown.splitlines() if line.startswith("| sharegpt | 2 | least request | 6 |")
    )
    assert "tokens/s | 100.0 (100.0 to 100.0) |" in first
    assert first.endswith("| yes |")
    assert "of 2 figures 2 are within 15%, 0 are not, and 0 can't be told from noise\n" in shown
    assert "hits" not in shown
    assert "| processor time of a step, s | 0.0400 (0.0400 to 0.0400) |" in shown
    assert not report([(scenario, pairs(6, 1.4, 0.03))])
    assert "of 2 figures 1 are within 15%, 1 are not" in capsys.readouterr().out
    assert not report([(scenario, pairs(4, 1.0, 0.03))])
    shown = capsys.readouterr().out
    assert "2 can't be told from noise; about 2 more rounds may tell" in shown
    cached = [Pair(figures(100, hits=0.8), figures(100, hits=0.4))] * 6
    assert not report([(scenario, cached)])
    shown = capsys.readouterr().out
    assert "| hits | 80.0% (80.0% to 80.0%) | 40.0% | -50.0% (-50.0% to -50.0%) | no |" in shown
    assert set(JUDGED) < set(asdict(cached[0].measured))


class Machine:
    """Stands in for real replicas: simulated ones, whose engines are slower."""

    def __init__(self):
        self.costs, self.calls = [], []

    def calibrated(self, number):
        self.costs.append(number)
        return replace(COSTS, machine=f"costs of round {number}")

    def measured(self, scenario, vocabulary):
        assert vocabulary == COSTS.limits.vocabulary
        self.calls.append(scenario)
        return simulate(replace(scenario, draw=99), COSTS, one_machine=True), 0.02


def test_rounds_go_on_in_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validation, "_RUN", {"output_tokens": 16, "warm_up": 2.0, "seconds": 6.0})
    monkeypatch.setattr(validation, "_DRAWS", 2)
    path, serve, machine = tmp_path / "rounds.json", ("--threads", "1"), Machine()
    kept = Kept.begin(serve, path, resumed=False)
    add_rounds(kept, 1, [1], machine.calibrated, machine.measured)
    again = Kept.begin(serve, path, resumed=True)
    assert again.runs == kept.runs
    assert again.missing(2, [1, 3]) == [(0, [3]), (1, [1, 3])]
    add_rounds(again, 2, [1, 3], machine.calibrated, machine.measured)
    assert machine.costs == [0, 0, 1]
    assert machine.calls == [scenario_of(*each) for each in ((0, 1), (0, 3), (1, 1), (1, 3))]
    assert again.missing(2, [1, 3]) == []
    assert Kept.begin(serve, path, resumed=True).runs == again.runs
    assert _kept(path).machine == "costs of round 1"
    for run in again.runs:
        assert run.measured.rate == pytest.approx(run.simulated.rate, rel=0.2)
        assert run.costs.machine == f"costs of round {run.round}"
    assert "row 2, sharegpt, 2 replicas, least request: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"measured with serve .*; name another file"):
        Kept.begin(("--threads", "2"), path, resumed=True)
    document = json.loads(path.read_text())
    document["runs"][0].pop("row")
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="has other runs"):
        Kept.begin(serve, path, resumed=True)


@pytest.mark.parametrize(("cores", "servers"), [(1, 4), (2, 4), (3, 6), (4, 4), (16, 4)])
def test_as_many_servers_start_as_rows_and_costs_need(cores, servers, monkeypatch):
    started = []

    @contextmanager
    def serve(*arguments):
        started.append(arguments)
        yield

    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(validation, "serve", serve)
    monkeypatch.setattr(validation, "add_rounds", lambda *_: None)
    validation.validate(Kept([], "a machine"), 1, [0], run=None)
    assert len(started) == servers >= at_once()[-1]


def test_no_two_runs_have_the_same_prompts():
    seeds = [scenario_of(number, row).seed for number in range(20) for row in range(len(ROWS))]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rounds", "3"], "are for --validate; give that too"),
        (["--validate", "--resume"], "--json FILE"),
        (["--validate", "--rows", "9"], "the validation has rows 1 to 8; name some of these"),
        (["--validate", "--rows", "0"], "not a number above 0"),
    ],
)
def test_arguments_that_say_nothing_are_refused(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scale", *arguments])
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
