"""No prompt waits for another's: what the scheduler promises of short, long, urgent and old ones."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from server.engine.kv_manager import KVManager
from server.engine.pace import FIRST, LEAST, Pace
from server.engine.scheduler import Scheduler
from server.messages import Sampling, Submit

LONG = 8000


def make(pages: int = 4000, budget: int = 512, **settings: Any) -> Scheduler:
    return Scheduler(KVManager(pages, 16), settings.pop("max_running", 64), budget, **settings)


def ask(scheduler: Scheduler, name: int, tokens: int, max_tokens: int = 4, **more: int) -> None:
    prompt = [name * 10_007 + i for i in range(tokens)]
    scheduler.add(Submit(id=name, prompt=prompt, sampling=Sampling(), max_tokens=max_tokens, **more))


def step(scheduler: Scheduler) -> dict[int, int]:
    """One step of a pretended model; tokens computed, by name."""
    scheduled = scheduler.schedule()
    for sequence, tokens in scheduled:
        scheduler.kv.advance(sequence, tokens)
        if sequence.remaining == 0:
            scheduler.kv.append(sequence, 7)
            if sequence.output_len == sequence.request.max_tokens:
                scheduler.remove(sequence.id)
    return {sequence.id: tokens for sequence, tokens in scheduled}


def steps_until(scheduler: Scheduler, done: Callable[[], bool], limit: int = 10_000) -> int:
    for count in range(limit):
        if done():
            return count
        assert step(scheduler)
    raise AssertionError(f"not within {limit} steps")


@pytest.mark.parametrize("longs", [1, 4])
def test_a_short_prompt_is_computed_in_the_next_step_beside_long_ones(longs: int) -> None:
    scheduler = make()
    for name in range(longs):
        ask(scheduler, name, LONG)
    step(scheduler)
    ask(scheduler, 10, 128)
    computed = step(scheduler)
    assert computed[10] == 128
    assert computed[0] >= 256
    assert sum(computed.values()) == 512


def test_the_oldest_prompt_goes_on_under_a_stream_of_short_ones() -> None:
    scheduler = make()
    ask(scheduler, 0, LONG)
    name = 0
    while scheduler._by_id[0].output_len == 0:
        name += 1
        ask(scheduler, name, 500)
        left = scheduler._by_id[0].remaining
        assert step(scheduler)[0] >= min(left, 200)
    assert name <= 2 * LONG / 512 + 10


def test_a_prompt_of_middle_length_does_not_wait_for_long_ones_that_came_before() -> None:
    scheduler = make()
    for name in range(4):
        ask(scheduler, name, LONG)
    step(scheduler)
    ask(scheduler, 10, 1000)
    count = steps_until(scheduler, lambda: scheduler._by_id[10].output_len > 0)
    assert count <= 1000 / 256 + 1


def test_a_cached_prompt_counts_as_short() -> None:
    scheduler = make()
    ask(scheduler, 10, 2000)
    steps_until(scheduler, lambda: 10 not in scheduler._by_id)
    for name in range(3):
        ask(scheduler, name, 1500)
    step(scheduler)
    ask(scheduler, 10, 2000)
    assert step(scheduler)[10] <= 16


def test_a_more_urgent_request_overtakes_a_prompt_that_is_computed() -> None:
    scheduler = make()
    for name in range(3):
        ask(scheduler, name, LONG)
    step(scheduler)
    ask(scheduler, 10, 2000, priority=1)
    assert step(scheduler) == {10: 512}


def test_so_many_long_prompts_are_computed_at_a_time() -> None:
    scheduler = make(max_prefills=2)
    for name in range(5):
        ask(scheduler, name, LONG)
    for _ in range(10):
        step(scheduler)
        assert len(scheduler.running) <= 2
    ask(scheduler, 10, 50)
    assert step(scheduler)[10] == 50


def test_short_prompts_leave_the_first_in_the_queue_its_pages() -> None:
    # 1 holds most pages; 2 waits for them, and the others, which would fit, must not take them one by one.
    scheduler = make(pages=601)
    ask(scheduler, 1, 5000, max_tokens=100)
    steps_until(scheduler, lambda: scheduler._by_id[1].output_len > 0)
    ask(scheduler, 2, 6000)
    for name in range(3, 300):
        ask(scheduler, name, 200, max_tokens=100)
        step(scheduler)
        if scheduler._by_id[2].computed:
            break
    assert 1 not in scheduler._by_id
    assert name < 120


def test_admitted_prompts_finish_without_giving_way_to_each_other() -> None:
    scheduler = make(pages=601)
    for name in range(12):
        ask(scheduler, name, 3000, max_tokens=1)
    steps_until(scheduler, lambda: not scheduler._by_id)
    assert scheduler.preemptions == 0


def test_a_middling_prompt_enters_beside_as_many_long_ones_as_there_may_be() -> None:
    scheduler = make(max_prefills=8, pace=Pace(0.05))
    for name in range(8):
        ask(scheduler, name, LONG)
    for _ in range(20):
        scheduler.pace.observe(sum(step(scheduler).values()), 0, 1.0)
    assert scheduler.pace.tokens == LEAST
    ask(scheduler, 10, 100)
    assert steps_until(scheduler, lambda: scheduler._by_id[10].output_len > 0) <= 100 / (LEAST / 2) + 1


def test_a_sequence_that_may_not_overtake_does_not_keep_out_the_first_in_the_queue() -> None:
    # 1 is computed; 2 fits, and 3, which is shorter, would not leave 2 its pages.
    scheduler = make(pages=201)
    ask(scheduler, 1, 1600)
    step(scheduler)
    ask(scheduler, 2, 1500)
    ask(scheduler, 3, 1400)
    step(scheduler)
    assert [sequence.id for sequence in scheduler.running] == [1, 2]


def test_no_sequence_is_preempted_for_pages_that_are_kept_for_another() -> None:
    scheduler = make(pages=301)
    ask(scheduler, 1, 1000, max_tokens=500)
    steps_until(scheduler, lambda: scheduler._by_id[1].output_len > 0)
    ask(scheduler, 2, 4000, priority=1)
    ask(scheduler, 3, 100, priority=1)
    for _ in range(20):
        step(scheduler)
    assert scheduler._by_id[1].preemptions <= 1


def test_a_waiting_sequence_keeps_pages_that_it_was_given() -> None:
    scheduler = Scheduler(KVManager(100, 16, prefix_cache=False), 8, 64)
    ask(scheduler, 1, 100)
    (sequence,) = scheduler.waiting
    assert scheduler.kv.extend(sequence, 96)
    sequence.computed = 96
    assert step(scheduler) == {1: 4}


def test_a_sample_whose_leader_begins_again_does_not_end_the_engine() -> None:
    scheduler = make(pages=60)
    ask(scheduler, 1, 300, max_tokens=200)
    ask(scheduler, 2, 300, max_tokens=200, leader=1)
    for _ in range(20):
        step(scheduler)
    scheduler.restart(scheduler._by_id[1])
    steps_until(scheduler, lambda: not scheduler._by_id)


@pytest.mark.parametrize("target", [0.02, 0.05])
def test_prompts_take_about_as_long_as_they_should_while_tokens_grow_dearer(target: float) -> None:
    pace, seen, durations = Pace(target), 0, []
    pace.observe(0, 8, 0.01)
    while seen < LONG:
        tokens = pace.tokens or 0
        seconds = 0.002 + tokens * (3e-4 + 1.5e-7 * seen)
        pace.observe(tokens, 8, seconds + 0.01)
        durations.append(seconds)
        seen += tokens
    steady = durations[4:]
    assert max(steady) < max(1.3 * target, 0.002 + LEAST * 1.6e-3)
    assert sum(steady) / len(steady) > 0.6 * target


def test_one_slow_step_does_not_make_the_next_ones_tiny_nor_does_a_small_one() -> None:
    pace = Pace(0.05)
    assert pace.tokens == FIRST
    pace.observe(FIRST, 0, 5.0)
    assert pace.tokens == FIRST // 2
    pace.observe(2, 0, 0.02)
    assert pace.tokens == FIRST // 2
    pace.observe(FIRST // 2, 0, 0.0)
    assert pace.tokens == FIRST


def simulate(seed: int, ticks: int) -> None:
    """Requests of all lengths and priorities come and go; pages and queues are checked on the way.

    In every step the most urgent running sequence gets tokens, and in the end nothing is left.
    """
    rng = random.Random(seed)
    page_size = rng.choice([1, 4, 16])
    scheduler = Scheduler(
        KVManager(rng.randint(40, 400), page_size, prefix_cache=rng.random() < 0.7),
        max_running := rng.randint(1, 20),
        max_running + rng.randint(0, 100),
        rng.randint(1, 4),
        Pace(rng.choice([None, 0.05])),
    )
    capacity = scheduler.kv.pool.total * page_size
    name, queued_at = 0, {}
    for tick in range(ticks):
        if len(scheduler._by_id) < 40 and rng.random() < 0.2:
            name += 1
            longest = capacity - 2 if rng.random() < 0.1 else min(capacity - 2, 60)
            length = rng.randint(1, max(1, longest))
            prompt = [rng.choice([0, 0, 0, 0, 0, 1]) for _ in range(length)]
            scheduler.add(
                Submit(
                    id=name,
                    prompt=prompt,
                    sampling=Sampling(),
                    max_tokens=rng.randint(1, max(1, min(30, capacity - length))),
                    priority=rng.choice([0, 0, 0, 1]),
                )
            )
            queued_at[name] = tick
        if scheduler._by_id and rng.random() < 0.01:
            scheduler.remove(rng.choice(list(scheduler._by_id)))
        if not scheduler._by_id:
            continue
        scheduled = scheduler.schedule()
        assert scheduled, f"seed {seed}: nothing is scheduled in tick {tick}"
        planned = {work.sequence for work in scheduled}
        leader = min(scheduler.running, key=lambda s: s.urgency)
        assert leader in planned, f"seed {seed}: {leader.id} starves in tick {tick}"
        tokens = sum(work.tokens for work in scheduled)
        assert tokens <= scheduler.max_batch_tokens
        for sequence, count in scheduled:
            scheduler.kv.advance(sequence, count)
            if sequence.remaining == 0:
                scheduler.kv.append(sequence, rng.randint(0, 1))
                if sequence.output_len == sequence.request.max_tokens:
                    scheduler.remove(sequence.id)
        scheduler.pace.observe(tokens, 0, rng.uniform(0.0001, 0.002) * tokens)
        if tick % 20 == 0:
            scheduler.check_integrity()
    steps_until(scheduler, lambda: not scheduler._by_id)
    scheduler.check_integrity()
    assert scheduler.kv.pool.held == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_simulated_hour(seed: int) -> None:
    simulate(seed, 1500)


@pytest.mark.stress
def test_a_million_simulated_steps() -> None:
    base = int(os.environ.get("LONGSPAN_SEED", random.randrange(2**32)))
    print(f"LONGSPAN_SEED={base}")
    for part in range(100):
        simulate(base + part, 10_000)
