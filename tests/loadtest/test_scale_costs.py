"""The work of the loads by which a step's costs are measured: what the engine's scheduler makes of them."""

import random

import pytest

from loadtest.direct.scale.calibrate import Load
from loadtest.direct.scale.costs import Work
from server.engine.core import EngineCore
from server.messages import Sampling, Submit
from tests.engine.simulation.runner import Clock, FakeRunner, Rule


@pytest.mark.parametrize("load", [Load(2, 6, 40, 9), Load(2, 4, 129, 12, known=True), Load(3, 5, 200, 1)])
def test_a_loads_work_is_that_of_its_steps(load):
    rng = random.Random(1)
    runner = FakeRunner(400, 16, Rule(None), 512, Clock(), random.Random(0))
    core = EngineCore(runner, context_length=512, max_running=64, max_batch_tokens=64)
    works, schedule = [], core.scheduler.schedule

    def recorded():
        scheduled = schedule()
        works.append(Work.of([(sequence.computed, tokens) for sequence, tokens in scheduled]))
        return scheduled

    def answer(number, prompt, output):
        # Of this seed no step raises, and no token is NaN.
        core.submit(Submit(id=number, prompt=prompt, sampling=Sampling(seed=1), max_tokens=output))

    core.scheduler.schedule = recorded
    same = rng.choices(range(40), k=load.prompt)
    prompts = [same if load.known else rng.choices(range(40), k=load.prompt) for _ in range(load.requests)]
    if load.known:
        answer(1000, same, 1)
        while core.has_work:
            core.step()
        works.clear()
    cached, left = dict.fromkeys(range(1, load.requests + 1), 0), list(enumerate(prompts, start=1))
    while left or core.has_work:
        while left and len(core.scheduler.running) + len(core.scheduler.waiting) < load.users:
            answer(*left.pop(), load.output)
        for output in core.step().sequences:
            cached[output.id] += output.cached_tokens
    assert set(cached.values()) == {load.prompt - 1 if load.known else 0}
    assert tuple(map(sum, zip(*works, strict=True))) == pytest.approx(
        tuple(load.work(len(works), [*cached.values()]))
    )
