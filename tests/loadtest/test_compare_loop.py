"""The order of a comparison's steps, with servers and questions whose time is that of a simulated clock."""

import random
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from loadtest.compare import group as loop
from loadtest.compare import run as whole_run
from loadtest.compare.estimate import Needs
from loadtest.compare.evaluator import FIRST_RATE
from loadtest.compare.group import FullFailedError, Listener
from loadtest.compare.plan import PlanError
from loadtest.compare.preflight import Found
from loadtest.compare.types import Outcome
from loadtest.compare.units import Rows, order
from loadtest.measuring.rounds import Rounds
from loadtest.measuring.servers import OpenError
from loadtest.measuring.types import CannotMeasureError, Weather
from loadtest.measuring.weather import Observed
from tests.loadtest.synthetic import FULL, LONG, TOPK, WINDOW, Sizes, Truth, draw

SIZES = Sizes(blocks=240, contexts=60, turns=6, tokens=4, tasks=("needles",), rounds=0, lengths=(LONG,))
QUALITY_SECONDS, SPEED_SECONDS = 4.0, 0.5  # of one candidate's turn
QUIET = Observed(Weather(), 1.0)
BUSY = Observed(Weather(foreign=0.5), 1.0, "PID 7 spin")


class World:
    """Servers, their truth, and the time that passes while they are measured.

    Attributes:
        now: seconds of the clock.
        whole: all rows that there could be.
        log: the steps: ``speed`` or ``quality``, the candidate, and when it ended.
        dead: candidates whose servers have ended, with the time.
    """

    def __init__(self, monkeypatch, speeds=None, noise=0.01, weather=QUIET, sizes=SIZES, seed=5, **truths):
        self.now, self.log, self.opened, self.dead = 0.0, [], [], {}
        self.visit_seconds = lambda load: SPEED_SECONDS
        self.turn_seconds = lambda unit: QUALITY_SECONDS
        self.sizes, self.rate = sizes, FIRST_RATE
        self.whole = draw(seed, sizes, **truths)
        self.refused, self.refusals = {}, []
        self.slow_until = 0.0
        self.speeds, self.noise, self.random = speeds or {}, noise, random.Random(1)
        rounds = SimpleNamespace(observe=lambda pids, idle: lambda: weather)
        monkeypatch.setattr(whole_run, "open_all", self.open_all)
        monkeypatch.setattr(whole_run, "try_all", lambda *plan: None)
        monkeypatch.setattr(whole_run, "Client", lambda host, port: Server(self, host))
        monkeypatch.setattr(loop, "Evaluator", lambda whole, client, **more: Evaluation(self, whole))
        monkeypatch.setattr(
            loop, "Rounds", lambda *args, **more: Rounds(*args, **more, observe=rounds.observe)
        )

    @contextmanager
    def open_all(self, deployments, arguments, kv):
        self.opened.append([each.name for each in deployments])
        if self.refused:
            raise OpenError(self.refused)
        yield {each.name: Server(self, each.name) for each in deployments}

    def compare(self, budget, at_once=9, units=1):
        """Runs a comparison without rows; gives it, with its judgments in the order in which they came."""
        comparison = replace(self.whole, answers=[], text=[], memory=[], speed=[], running={}, spent=0.0)
        found = Found(comparison.plan, {}, {}, None, at_once, Needs(0, 0, 0, 0), self.rate)
        material = SimpleNamespace(text="", prose="", own=(), units=units)
        judgments = []
        listener = Listener(lambda words: None, judgments.append)
        whole_run.run(comparison, found, material, budget, listener, clock=lambda: self.now)
        return comparison, judgments

    def passes(self, kind, name, seconds):
        if self.now >= self.dead.get(name, float("inf")):
            self.refusals.append(name)
            return False
        self.now += seconds
        self.log.append((kind, name, self.now))
        return True

    def spent(self, kind):
        return sum(done == kind for done, *_ in self.log)


class Server:
    pids = ()

    def __init__(self, world, name):
        self.world, self.name, self.host, self.port = world, name, name, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def allow(self, seconds):
        assert seconds >= loop.LEAST_PATIENCE

    def model_info(self):
        how = self.world.whole.running[self.name]
        attention = SimpleNamespace(kernel=how["kernel"], reason=how["reason"], options=how["options"])
        return SimpleNamespace(attention=attention)

    def measure(self, load, seed):
        world = self.world
        if not world.passes("speed", self.name, world.visit_seconds(load)):
            raise CannotMeasureError("the engine died")
        slow = 3.0 if world.now < world.slow_until else 1.0
        tpot = slow * 0.005 / world.speeds.get(self.name, 1.0) * world.random.lognormvariate(0, world.noise)
        return {"tpot": tpot, "output_rate": 1 / tpot, **({} if load.cached else {"ttft": 200 * tpot})}


class Evaluation:
    """Hands out the rows that there could be, a context or four blocks of text at a time."""

    def __init__(self, world, own):
        self.world, self.own = world, own

    def units(self):
        plan, most = self.own.plan, self.world.sizes.contexts
        return order(plan.contexts, plan.tasks, {length: range(most) for length in plan.contexts}, most=most)

    def due(self, unit, among):
        have = {row.deployment for row in self.rows(self.own, unit)}
        return [name for name in among if name not in have]

    def cost(self, unit, among):
        return self.world.turn_seconds(unit) * len(among)

    def rows(self, comparison, unit):
        """Those of a unit that a comparison has."""
        at = {"answers": comparison.answers, "text": comparison.text, "memory": comparison.memory}[unit.kind]
        number = {
            "answers": lambda row: row.index,
            "text": lambda row: row.block // 4,
            "memory": lambda row: 0,
        }
        here = [row for row in at if (row.length, number[unit.kind](row)) == (unit.length, unit.index)]
        return [row for row in here if unit.kind != "answers" or row.task == unit.task]

    def run(self, unit, clients, end):
        rows = Rows()
        there = self.rows(self.world.whole, unit)
        for name in clients:
            if self.world.passes("quality", name, self.world.turn_seconds(unit)):
                getattr(rows, unit.kind).extend(row for row in there if row.deployment == name)
            else:
                rows.failed[name] = "the server has ended"
        return rows


def test_a_run_ends_when_all_is_told_and_says_so(monkeypatch):
    """A safe and fast variant, and one that loses much: neither takes all of the time."""
    world = World(monkeypatch, {TOPK.name: 1.5, WINDOW.name: 2.0}, window=Truth(lost=0.6, nats=0.5))
    comparison, judgments = world.compare(budget=20_000.0)
    assert world.now < 2_000
    assert max(cell.round for cell in comparison.speed) < 20, "more rounds would tell nothing"
    window, topk = judgments[-1].verdicts
    assert (window.outcome, topk.outcome) == (Outcome.UNSAFE, Outcome.SAFE)
    assert judgments[-1].advice.winner == TOPK.name
    assert comparison.spent == pytest.approx(world.now)
    assert not comparison.busy


@pytest.mark.parametrize("budget", [100.0, 400.0])
def test_time_is_shared_and_kept_where_nothing_is_settled(monkeypatch, budget):
    world = World(monkeypatch, noise=0.1, topk=Truth(lost=0.05), window=Truth(lost=0.05))
    comparison, _ = world.compare(budget)
    assert budget - 3 * QUALITY_SECONDS - 1 <= world.now <= budget
    share = world.spent("speed") * SPEED_SECONDS / world.now
    assert share == pytest.approx(loop.SPEED_SHARE, abs=0.12)
    rounds = {load.label: set() for load in comparison.plan.loads}
    for cell in comparison.speed:
        rounds[cell.load].add(cell.round)
    counts = [len(numbers) for numbers in rounds.values()]
    assert max(counts) - min(counts) <= 1, "loads come by turns"


def test_on_a_busy_machine_quality_goes_first(monkeypatch):
    """Speed gets its first rounds, which show how busy it is, and then only time that nothing else needs."""
    world = World(monkeypatch, weather=BUSY, topk=Truth(lost=0.05), window=Truth(lost=0.05))
    comparison, judgments = world.compare(400.0)
    assert "PID 7 spin" in comparison.busy
    assert "PID 7 spin" in judgments[-1].advice.sentences[0]
    assert world.spent("speed") * SPEED_SECONDS < 0.15 * world.now


def test_rounds_of_a_slow_stretch_are_measured_again(monkeypatch):
    world = World(monkeypatch, {TOPK.name: 1.5})
    world.slow_until = 30.0
    comparison, judgments = world.compare(2_000.0)
    aside = {(cell.load, cell.round) for cell in comparison.speed if cell.set_aside}
    assert {load for load, _ in aside} == {comparison.plan.loads[0].label}, "it comes first"
    assert not comparison.busy
    assert judgments[-1].advice.winner == TOPK.name
    gains = [gain for gain in judgments[-1].verdicts[1].gains if gain.figure == "tpot"]
    assert [gain.own.value for gain in gains] == pytest.approx([0.005 / 1.5] * len(gains), rel=0.03)


def test_a_variant_that_fails_is_left_out_and_the_others_go_on(monkeypatch):
    world = World(monkeypatch, noise=0.1, window=Truth(lost=0.05))
    world.dead[TOPK.name] = 60.0
    comparison, judgments = world.compare(300.0)
    assert list(comparison.failed) == [TOPK.name]
    assert len(world.refusals) <= len(comparison.plan.loads) + 1, "it is not asked without end"
    assert judgments[-1].verdicts[1].outcome is Outcome.UNKNOWN
    assert max(when for _, name, when in world.log if name == WINDOW.name) > 250


def test_a_run_ends_where_only_full_attention_is_left(monkeypatch):
    world = World(monkeypatch, noise=0.1)
    world.dead = {TOPK.name: 20.0, WINDOW.name: 20.0}
    world.compare(10_000.0)
    assert world.now < 150


def test_without_full_attention_nothing_goes_on(monkeypatch):
    world = World(monkeypatch)
    world.dead[FULL.name] = 30.0
    with pytest.raises(FullFailedError, match="full failed while it was measured"):
        world.compare(300.0)
    assert world.now < 40


def test_servers_that_memory_does_not_hold_at_once_share_the_time(monkeypatch):
    world = World(monkeypatch, noise=0.1, topk=Truth(lost=0.05), window=Truth(lost=0.05))
    comparison, judgments = world.compare(400.0, at_once=2)
    assert world.opened == [[FULL.name, WINDOW.name], [FULL.name, TOPK.name]]
    ended = max(when for _, name, when in world.log if name == WINDOW.name)
    assert ended == pytest.approx(200, abs=2 * QUALITY_SECONDS + 1)
    assert world.now == pytest.approx(400, abs=2 * QUALITY_SECONDS + 1)
    assert set(comparison.running) == {FULL.name, WINDOW.name, TOPK.name}
    for verdict in judgments[-1].verdicts:
        assert {gain.figure for gain in verdict.gains if gain.own.claimed} >= {"tpot", "ttft"}


def test_later_servers_get_rounds_though_earlier_ones_had_the_most_that_there_are(monkeypatch):
    monkeypatch.setattr(loop, "MOST_ROUNDS", 8)
    world = World(monkeypatch, noise=0.1, topk=Truth(lost=0.05), window=Truth(lost=0.05))
    comparison, _ = world.compare(400.0, at_once=2)
    for load in comparison.plan.loads:
        for name in (WINDOW.name, TOPK.name):
            cells = [cell for cell in comparison.speed if (cell.deployment, cell.load) == (name, load.label)]
            # Top-k reads new prompts as full attention does, which takes no more rounds than an interval.
            same = name == TOPK.name and not load.cached
            assert len({cell.round for cell in cells}) == (6 if same else 8)


def test_servers_that_do_not_start_are_all_named(monkeypatch):
    world = World(monkeypatch)
    world.refused = {WINDOW.name: "no memory", TOPK.name: "no such option"}
    with pytest.raises(PlanError, match=r"no memory\n.*no such option"):
        world.compare(300.0)


def test_a_variant_that_surely_loses_is_asked_no_more_while_another_is_open(monkeypatch):
    world = World(monkeypatch, window=Truth(lost=0.9, nats=1.0), topk=Truth(lost=0.05))
    comparison, judgments = world.compare(1_500.0)
    asked = {
        name: {row.index for row in comparison.answers if row.deployment == name}
        for name in (FULL.name, WINDOW.name, TOPK.name)
    }
    assert asked[WINDOW.name] < asked[TOPK.name] == asked[FULL.name], "what is asked is paired"
    assert len(asked[WINDOW.name]) < 0.6 * len(asked[TOPK.name])
    assert judgments[-1].verdicts[0].outcome is Outcome.UNSAFE


def test_figures_that_are_checked_have_their_units_though_the_verdict_is_certain(monkeypatch):
    """A perplexity is claimed of two slices; a loss in tasks may be certain after the first."""

    def slices(units):
        world = World(monkeypatch, window=Truth(lost=1.0, nats=1.0))
        comparison, _ = world.compare(1_500.0, units=units)
        return {row.block // 4 for row in comparison.text if row.deployment == WINDOW.name}

    assert slices(1) == {0}
    assert slices(2) == {0, 1}


def test_each_round_is_judged_and_booked(monkeypatch):
    """Where only speed is open, nothing else would tell the progress."""
    world = World(monkeypatch, noise=0.3, window=Truth(lost=0.9, nats=1.0), topk=Truth(lost=0.9, nats=1.0))
    comparison, judgments = world.compare(300.0)
    rounds = sum(
        1 + max(c.round for c in comparison.speed if c.load == x.label) for x in comparison.plan.loads
    )
    units = len({row.index for row in comparison.answers}) + len({row.block // 4 for row in comparison.text})
    assert len(judgments) >= rounds + units
    assert comparison.spent == pytest.approx(world.now)


def test_the_rate_that_was_measured_is_handed_to_the_evaluator(monkeypatch):
    world, rates = World(monkeypatch), []
    evaluation = loop.Evaluator
    monkeypatch.setattr(
        loop, "Evaluator", lambda *args, **more: rates.append(more["rate"]) or evaluation(*args, **more)
    )
    world.rate = 4321.0
    world.compare(50.0)
    assert rates == [4321.0]
