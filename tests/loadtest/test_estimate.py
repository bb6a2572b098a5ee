"""The estimate of a comparison's duration, told before it measures."""

import io
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loadtest.cli.application import application
from loadtest.cli.compare_progress import Watcher
from loadtest.compare import estimate, preflight, run
from loadtest.compare.estimate import Needs, Pace, already, minutes, needs, outlook, probe, refusal
from loadtest.compare.plan import Asked, make_plan
from loadtest.compare.preflight import Found
from loadtest.compare.units import Unit
from loadtest.measuring.servers import groups
from loadtest.measuring.statistics import least, score_loss
from tests.loadtest.synthetic import Sizes, Truth, draw


class Machine:
    """A server that takes 1 ms and 1 us squared per token of a prompt, and 10 ms per output token."""

    def __init__(self, times=1.0):
        self.now, self.asked, self.times = 0.0, [], times

    def stream(self, prompt, *, max_tokens, ignore_eos, **rest):
        tokens = len(prompt) + max_tokens
        self.asked.append(tokens)
        self.now += self.times * (1e-3 * tokens + 1e-6 * tokens**2)
        for number in range(max_tokens):
            self.now += 0.01 if number else 0.0
            yield SimpleNamespace(token_ids=[5])


def probed(monkeypatch, contexts, **slow):
    machine = Machine(**slow)
    monkeypatch.setattr(estimate.time, "monotonic", lambda: machine.now)
    return probe(machine, contexts, 49152, 7.0), machine


def test_two_requests_tell_the_cost_of_any_prompt(monkeypatch):
    pace, machine = probed(monkeypatch, (1024, 2048, 4096))
    assert machine.asked[1:] == [1024, 4096]
    assert pace.prefill(2048) == pytest.approx(2.048 + 2.048**2, rel=1e-6)
    assert (pace.start, pace.tpot) == (7.0, pytest.approx(0.01))
    assert pace.rate(4096) == pytest.approx(4608 / (4.096 + 4.096**2 + 5.12))


def test_a_request_that_would_take_too_long_is_not_tried(monkeypatch):
    pace, machine = probed(monkeypatch, (4096,), times=3.0)
    assert machine.asked[1:] == [1024]
    assert pace.prefill(4096) == pytest.approx(4 * pace.prefill(1024))


class Units:
    """Every step takes 9 seconds on all candidates."""

    def units(self):
        for number in itertools.count():
            for length in (1024, 4096):
                yield Unit("text", length, number)
                yield Unit("answers", length, number, "needles")
                if not number:
                    yield Unit("memory", length)

    def cost(self, unit):
        return 9.0


def test_needs_are_by_round_and_by_kind_of_step():
    plan, _ = make_plan(Asked())
    pace = Pace(10.0, 1e-3, 0.0, 0.01)
    at_once = needs(plan, pace, Units(), groups(plan.candidates, 9))
    # 32 tokens after cached prompts, or after new ones of 992 and 4064; three variants, there and back.
    assert at_once.rounds == pytest.approx(6 * (4 * 0.32 + 0.992 + 4.064))
    assert (at_once.units, at_once.least) == (6 * 9.0, pytest.approx(6 * 0.32))
    assert 20 <= at_once.start <= 30
    in_turn = needs(plan, pace, Units(), groups(plan.candidates, 2))
    assert in_turn.start == 80, "two groups of two, which are tried first"
    assert in_turn.rounds == pytest.approx(at_once.rounds * 4 / 3)
    rated, _ = make_plan(Asked(rate=2.0, contexts=[1024]))
    assert needs(rated, pace, Units(), groups(rated.candidates, 9)).rounds == pytest.approx(
        6 * (8 * (0.001 * (1024 - 32)) + 0.32)
    ), "eight at two a second, of which each takes a second"


def shown(words):
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(words, markup=False)
    return console.export_text().splitlines()


def test_the_estimate_before_it_begins():
    found = Needs(start=12.0, rounds=14.0, units=20.0, least=1.0)
    (line,) = outlook(found, 300.0, 8.0, 0.95)
    assert line == "about 5:00, the budget: start-up 0:20, speed 2:06 (9 rounds), quality 2:34"
    assert len(shown(line)) == 1
    _, more = outlook(found, 120.0, 8.0, 0.95)
    assert more == (
        '6 rounds, which intervals take, and 6 steps of each kind, which a "safe" takes: about 3:44'
    )
    (short,) = outlook(found, 50.0, 8.0, 0.95)
    assert "the budget of 0:50 is short" in short
    assert "take about 0:54; a verdict takes about 3:44: --budget 4m" in short


def test_a_continued_run_tells_the_rows_of_its_file():
    sizes = Sizes(blocks=8, tokens=2, contexts=2, turns=4, rounds=6)
    drawn = draw(1, sizes, topk=Truth(), window=Truth())
    (line,) = already(drawn)
    assert line.startswith(f"the file has {minutes(drawn.spent)} of measuring: ")
    rounds = 6 * len({row.load for row in drawn.speed})
    questions = sum(row.deployment == "full" for row in drawn.answers)
    assert f": {rounds} rounds of speed, {questions} questions, 16 blocks of text" in line
    assert already(replace(drawn, speed=[], answers=[], text=[])) == []


def test_a_budget_for_nothing_is_refused_with_the_one_it_takes(monkeypatch):
    plan, _ = make_plan(Asked())
    found = Found(plan, {}, {}, None, 9, Needs(10.0, 900.0, 800.0, least=90.0))
    monkeypatch.setattr(preflight, "look", lambda *asked: found)
    monkeypatch.setattr(run, "run", lambda *asked: pytest.fail("it measures"))
    outcome = CliRunner().invoke(application, ["compare", "--budget", "60s"])
    assert outcome.exit_code == 2
    said = " ".join(outcome.stderr.split())
    assert "nothing can be measured in the 0:5" in said
    assert "start-up and the cheapest step take about 1:40" in said
    assert said.endswith("a verdict 2:50:10; give --budget 171m")
    assert refusal(found.needs, 60.0, 0.0, 0.95).count("28:30") == 1


def test_a_verdict_takes_as_many_contexts_as_show_a_variant_safe_that_loses_nothing():
    plan, _ = make_plan(Asked())
    pace, parts = Pace(10.0, 1e-3, 0.0, 0.01), groups(plan.candidates, 9)
    takes = needs(plan, pace, Units(), parts).contexts
    at, below = (
        score_loss([1.0] * 12 * count, [1.0] * 12 * count, 0.95, [n // 12 for n in range(12 * count)]).high
        for count in (takes, takes - 1)
    )
    assert at <= plan.margins.score < below
    several = replace(plan, tasks=("needles", "vt", "cwe"))
    assert needs(several, pace, Units(), parts).contexts == least(0.95), "together they have enough"
    tight = replace(plan, margins=replace(plan.margins, score=0.01))
    assert needs(tight, pace, Units(), parts).contexts > 2 * takes


def test_progress_tells_the_time_left_in_a_line():
    now = [0.0]
    watcher = Watcher(300, None, live=False, clock=lambda: now[0])
    now[0] = 48.5
    watcher.doing("needles at 4k, context 12")
    assert watcher._line() == "at most 4:11 left of 5:00: needles at 4k, context 12"
