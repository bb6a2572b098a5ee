"""The simulation of replicas: shared processors, the real scheduler, routing, and wrong costs."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import simpy

from loadtest.direct.scale.costs import Costs, Limits, LoopCost, StepCost, Work
from loadtest.direct.scale.processors import Loop, Processors
from loadtest.direct.scale.replica import Replica
from loadtest.direct.scale.routing import Router
from loadtest.direct.scale.simulate import simulate
from loadtest.direct.scale.study import BOUND, errors
from loadtest.direct.scale.traffic import Scenario
from server.engine.core import EngineCore
from server.messages import Sampling, Submit
from tests.engine.simulation.runner import Clock, FakeRunner, Rule

STEP = StepCost(step=4e-3, decode=1e-3, context=1e-6, token=1e-3, pair=1e-7)
COSTS = Costs(
    step=STEP,
    engine=LoopCost(1e-4, 1e-4, 1e-5),
    server=LoopCost(5e-4, 1e-4, 5e-5),
    client=LoopCost(5e-4, 1e-4, 5e-5),
    cores=2,
    beside=0.9,
    limits=Limits(1000, 16, 64, 512, 8, 0.04, 4096, 30.0, True, 8192, 32000),
    machine="2 cores of a test",
)
SESSIONS = Scenario(4, "affinity", "sessions", users=2, output_tokens=16, warm_up=4.0, seconds=8.0)


def ends(env, events):
    """When each event comes."""
    found = {}
    for number, event in enumerate(events):
        event.callbacks.append(lambda _, number=number: found.setdefault(number, env.now))
    env.run()
    return [found.get(number) for number in range(len(events))]


def test_tasks_share_processors_evenly():
    env = simpy.Environment()
    cores = Processors(env, 2, beside=0.8)
    # Three at 2 * 0.8 / 3 each until the shortest is done; two at 0.8 until the next is; then one alone.
    assert ends(env, [cores.work(seconds) for seconds in (0.8, 1.6, 2.0)]) == pytest.approx([1.5, 2.5, 2.9])
    assert cores.given == pytest.approx(4.4)


def test_processor_time_is_neither_lost_nor_made():
    env, rng = simpy.Environment(), random.Random(0)
    cores, asked = Processors(env, 3), 0.0
    done = []

    def arrivals():
        nonlocal asked
        for _ in range(200):
            yield env.timeout(rng.expovariate(4))
            seconds = rng.uniform(0, 1)
            task = cores.work(seconds)
            if rng.random() < 0.1:
                before = cores.given
                cores.cancel(task)
                assert cores.given == before
            else:
                asked += seconds
                task.callbacks.append(lambda _: done.append(env.now))

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
    costs = replace(COSTS, step=recorder, limits=limits, server=LoopCost())
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


def test_affinity_keeps_within_its_bound():
    router = Router("affinity", 4)
    taken = [router.begin([7] * 100) for _ in range(40)]
    assert len(set(taken[:3])) == 1
    assert max(router.active) <= 1.5 * 40 / 4 + 1
    for replica in taken:
        router.end(replica)
    assert router.begin([7] * 100) == taken[0]


def test_a_seed_gives_the_same_figures_and_affinity_more_hits():
    affinity = simulate(SESSIONS, COSTS)
    assert affinity == simulate(SESSIONS, COSTS)
    assert affinity != simulate(replace(SESSIONS, seed=1), COSTS)
    turns = simulate(replace(SESSIONS, policy="round robin"), COSTS)
    assert affinity.hits > 2 * turns.hits
    assert affinity.ttft < turns.ttft


def test_what_the_validation_would_find():
    """Negative controls: an engine that is slower than was measured, and cores that are not shared."""
    scenario = replace(SESSIONS, traffic="sharegpt")
    real = simulate(scenario, COSTS, one_machine=True)
    assert max(map(abs, errors(real, real).values())) == 0
    slow = replace(COSTS, step=StepCost(*(1.3 * cost for cost in vars(STEP).values())))
    assert errors(real, simulate(scenario, slow, one_machine=True))["rate"] < -BOUND
    assert errors(real, simulate(scenario, COSTS))["rate"] > BOUND
    lost = SimpleNamespace(rate=real.rate, ttft=real.ttft, hits=0.0)
    assert errors(simulate(SESSIONS, COSTS, one_machine=True), lost)["hits"] < -BOUND
