"""The simulation of replicas: shared processors, the real scheduler, routing, and wrong costs."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import simpy

from loadtest.direct.scale import validation
from loadtest.direct.scale.__main__ import _kept
from loadtest.direct.scale.costs import Costs, Limits, LoopCost, StepCost, Work
from loadtest.direct.scale.errors import BOUND, NO, Pair, error, told, verdict
from loadtest.direct.scale.processors import Loop, Processors, Speeds
from loadtest.direct.scale.replica import Replica
from loadtest.direct.scale.routing import Router
from loadtest.direct.scale.simulate import simulate
from loadtest.direct.scale.traffic import Scenario
from loadtest.direct.scale.validation import expected
from server.engine.core import EngineCore
from server.messages import Sampling, Submit
from tests.engine.simulation.runner import Clock, FakeRunner, Rule

STEP = StepCost(step=4e-3, decode=1e-3, context=1e-6, token=1e-3, pair=1e-7)
BESIDE = StepCost(step=5e-3, decode=1.2e-3, context=1.2e-6, token=1.3e-3, pair=1.2e-7)
CROWDED = StepCost(*(1.4 * cost for cost in vars(BESIDE).values()))
COSTS = Costs(
    alone=STEP,
    beside=BESIDE,
    crowded=CROWDED,
    server=LoopCost(5e-4, 1e-4, 5e-5),
    client=LoopCost(5e-4, 1e-4, 5e-5),
    cores=2,
    limits=Limits(1000, 16, 64, 512, 8, 0.04, 30.0, True, 8192, 32000),
    machine="2 cores of a test",
)
SESSIONS = Scenario(4, "affinity", "sessions", users=2, output_tokens=16, warm_up=4.0, seconds=8.0)


def ends(env, cores, *works):
    """When work of so many seconds and such speeds, all begun now, is done."""
    found = {}
    for number, (seconds, *speeds) in enumerate(works):
        cores.work(seconds, lambda number=number: found.setdefault(number, env.now), *speeds)
    begun = env.now
    env.run()
    return [found[number] - begun for number in range(len(works))]


def test_tasks_share_processors_evenly():
    env = simpy.Environment()
    cores, beside = Processors(env, 2), Speeds(0.8, 0.8)
    assert ends(env, cores, (0.8, beside), (1.6, beside)) == pytest.approx([1.0, 1.8])  # at 0.8, then alone
    assert ends(env, cores, (1.0,), (1.0,), (1.0,)) == pytest.approx([1.5] * 3)
    half = Speeds(0.5, 0.5)
    # Two thirds of a core each, steps at 0.75, since each is on the other core for half of the time.
    assert ends(env, cores, (1.0, half), (0.5,), (2.0, half))[1] == pytest.approx(0.75)
    assert cores.given == pytest.approx(2.4 + 3.0 + 3.5)
    # Steps had cores for this long: two thirds of both until 0.75, whole ones until 2.0, and one until 3.0.
    assert cores.on_steps == pytest.approx(1.0 + 1.8 + 2 * (0.5 + 1.25) + 1.0)


def test_steps_are_slower_on_crowded_cores():
    env = simpy.Environment()
    cores, speeds = Processors(env, 2), Speeds(0.8, 0.5)
    assert ends(env, cores, *[(1.0, speeds)] * 4) == pytest.approx([4.0] * 4)
    # One of the two cores has two steps: two thirds of a core each, at the mean of both speeds.
    assert ends(env, cores, *[(1.0, speeds)] * 3) == pytest.approx([1.5 / 0.65] * 3)
    assert ends(env, cores, *[(1.0, speeds)] * 2) == pytest.approx([1 / 0.8] * 2)
    assert ends(env, cores, *[(1.0,)] * 4) == pytest.approx([2.0] * 4)


def test_a_task_that_is_done_at_the_same_moment_is_cancelled_no_more():
    env, told = simpy.Environment(), []
    cores = Processors(env, 2)
    cores.work(1.0, lambda: told.append(cores.cancel(other)))
    other = cores.work(1.0, lambda: told.append("done"))
    env.run()
    assert told == [False, "done"]
    assert cores.given == pytest.approx(2.0)


def test_processor_time_is_neither_lost_nor_made():
    env, rng = simpy.Environment(), random.Random(0)
    cores, asked = Processors(env, 3), 0.0

    def arrivals():
        nonlocal asked
        for _ in range(200):
            yield env.timeout(rng.expovariate(4))
            seconds = rng.uniform(0, 1)
            task = cores.work(seconds, lambda: None)
            if rng.random() < 0.1:
                before = cores.given
                cores.cancel(task)
                assert cores.given == before
            else:
                asked += seconds

    env.process(arrivals())
    env.run()
    assert cores.given == pytest.approx(asked)
    assert env.now >= asked / 3


def test_a_loop_does_one_thing_after_the_other():
    env, seen = simpy.Environment(), []
    loop = Loop(Processors(env, 4))
    for seconds in (0.5, 0.0, 1.0):
        loop.do(seconds, lambda seconds=seconds: seen.append((seconds, env.now)))
    env.run()
    assert seen == [(0.5, 0.5), (0.0, 0.5), (1.0, 1.5)]


class Recorder:
    """Step costs that keep the work."""

    def __init__(self):
        self.works = []

    def of(self, work):
        self.works.append(work)
        return STEP.of(work)


@pytest.mark.parametrize("pages", [400, 40])
def test_a_replica_computes_the_steps_of_the_engine(pages):
    """Chunks, prefix hits and, with few pages, preemptions."""
    limits = replace(
        COSTS.limits, pages=pages, max_batch_tokens=64, prompt_step_seconds=0.0, context_length=512
    )
    rng = random.Random(1)
    begin = rng.choices(range(40), k=64)
    prompts = [begin[: rng.randint(0, 64)] + rng.choices(range(40), k=rng.randint(2, 200)) for _ in range(12)]
    env, recorder, told = simpy.Environment(), Recorder(), []
    costs = replace(COSTS, alone=recorder, beside=STEP, crowded=STEP, limits=limits, server=LoopCost())
    replica = Replica(env, Processors(env, 2), costs, told.extend)
    runner = FakeRunner(pages, 16, Rule(None), 512, Clock(), random.Random(0))
    core = EngineCore(runner, context_length=512, max_running=64, max_batch_tokens=64, aging_seconds=30.0)
    for number, prompt in enumerate(prompts, start=1):
        replica.ask(number, prompt, 5 * number)
        # Of this seed no step raises, and no token is NaN.
        core.submit(Submit(id=number, prompt=prompt, sampling=Sampling(seed=1), max_tokens=5 * number))
    real, schedule = [], core.scheduler.schedule

    def recorded():
        scheduled = schedule()
        real.append(Work.of([(sequence.computed, tokens) for sequence, tokens in scheduled]))
        return scheduled

    core.scheduler.schedule = recorded
    while core.has_work:
        core.step()
    env.run(until=100)
    assert recorder.works == real
    assert replica.steps == len(real)
    assert len(told) == 5 * sum(range(1, 13))
    assert (core.scheduler.preemptions > 0) == (pages == 40)


def test_costs_are_found_again():
    works = [Work.of([(100 * n % 700, 1)] * n + [(64 * n, 16 * n)] * (n % 2)) for n in range(1, 12)]
    found = StepCost.fit([(work, STEP.of(work)) for work in works])
    assert [STEP.of(work) for work in works] == pytest.approx([found.of(work) for work in works])
    assert found.step == pytest.approx(STEP.step)


def test_the_costs_of_the_study_are_read_and_those_that_the_document_names():
    docs = Path(__file__).parents[2] / "docs"
    step = _kept(docs / "scale-costs.json").alone
    sentence = f"{1e3 * step.step:g} ms a step, {1e3 * step.decode:g} a decode, {1e3 * step.token:g} a prompt"
    sentence += f" token, {1e6 * step.context:g} and {1e6 * step.pair:g} for 1,000 tokens that these see"
    assert sentence in " ".join((docs / "scale.md").read_text().split())


def test_affinity_keeps_within_its_bound():
    router = Router("affinity", 4)
    taken = [router.begin([7] * 100) for _ in range(40)]
    assert len(set(taken[:3])) == 1
    assert max(router.active) <= 1.5 * 40 / 4 + 1
    for replica in taken:
        router.end(replica)
    assert router.begin([7] * 100) == taken[0]


def test_another_draw_has_the_same_prompts():
    one, other = (replace(SESSIONS, draw=draw, traffic="sharegpt") for draw in (0, 3))
    first, second = one.sessions(32000), other.sessions(32000)
    assert [next(first) for _ in range(20)] == [next(second) for _ in range(20)]
    late = [b - a for a, b in zip(one.begins(), other.begins(), strict=True)]
    assert all(0 <= each <= 0.01 for each in late)
    assert len(set(late)) == len(late) == 8
    assert other.begins() == sorted(other.begins()) != replace(other, draw=4).begins()
    routers = [Router("least request", 4, each.routing_seed) for each in (one, other)]
    assert [routers[0].begin([]) for _ in range(40)] != [routers[1].begin([]) for _ in range(40)]


def test_simulations_have_the_prompts_of_the_real_replicas(monkeypatch):
    """With other ones a short run is another one: the rate is off by several times as much."""
    monkeypatch.setattr(validation, "_DRAWS", 2)  # seven times as much, as with all of them
    scenario = replace(
        SESSIONS, replicas=2, users=4, traffic="sharegpt", policy="least request", seconds=12.0
    )
    own, other = [], []
    for seed in range(1, 4):
        real = simulate(replace(scenario, seed=seed, draw=99), COSTS, one_machine=True)
        own.append(abs(expected(replace(scenario, seed=seed), COSTS).rate / real.rate - 1))
        other.append(abs(expected(replace(scenario, seed=seed + 50), COSTS).rate / real.rate - 1))
    assert sum(own) < sum(other) / 2


def test_a_seed_gives_the_same_figures_and_affinity_more_hits():
    affinity = simulate(SESSIONS, COSTS)
    assert affinity == simulate(SESSIONS, COSTS)
    assert affinity != simulate(replace(SESSIONS, seed=1), COSTS)
    turns = simulate(replace(SESSIONS, policy="round robin"), COSTS)
    assert affinity.hits > 1.5 * turns.hits
    assert affinity.ttft < turns.ttft


def off(name, real, simulated):
    """The error of a figure in six runs alike."""
    return error(name, [Pair(real, simulated)] * 6)


def test_what_the_validation_would_find():
    """Negative controls: engines slower than measured, cores not shared, or crowded without a loss."""
    scenario = replace(SESSIONS, replicas=2, users=4, traffic="sharegpt", seconds=16.0)
    real = simulate(scenario, COSTS, one_machine=True)
    assert {off(name, real, real).value for name in ("rate", "ttft", "ttft_p50", "hits")} == {0}
    slow = [StepCost(*(1.5 * cost for cost in vars(each).values())) for each in (STEP, BESIDE, CROWDED)]
    named = dict(zip(("alone", "beside", "crowded"), slow, strict=True))
    slower = simulate(scenario, replace(COSTS, **named), one_machine=True)
    assert off("rate", real, slower).value < -BOUND
    assert verdict(off("rate", real, slower)) == NO
    four = replace(scenario, replicas=4, users=2)
    assert off("rate", real, simulate(four, COSTS)).value > BOUND
    crowded = simulate(four, COSTS, one_machine=True)
    wrong = simulate(four, replace(COSTS, crowded=BESIDE), one_machine=True)
    assert off("rate", crowded, wrong).value > BOUND
    real = simulate(SESSIONS, COSTS)
    lost = replace(real, hits=0.0)
    assert off("hits", real, lost).value < -BOUND < 0 == off("hits", real, real).value
    assert verdict(off("hits", lost, real)) == NO
    assert "hits" not in told([Pair(lost, lost)])
    assert "hits" in told([Pair(lost, real)])
