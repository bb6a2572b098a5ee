"""No prompt waits for all of another's: what the scheduler promises of short, long, urgent and old ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.division import PATIENCE
from server.engine.kv_manager import KVManager
from server.engine.pace import FIRST, LEAST, MULTIPLE, Pace, Work
from server.engine.scheduler import QUIET, Scheduler
from server.messages import Beams, Sampling, Submit
from tests.engine.pretended import ask, step

LONG = 8000


def make(pages: int = 4000, budget: int = 512, **settings: Any) -> Scheduler:
    return Scheduler(KVManager(pages, 16), settings.pop("max_running", 64), budget, **settings)


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


@pytest.mark.parametrize("target", [None, 0.05])
@pytest.mark.parametrize("tokens", [100, LONG])
def test_short_prompts_leave_a_search_that_is_first_in_the_queue_its_places(
    tokens: int, target: float | None
) -> None:
    scheduler = make(max_running=8, pace=Pace(target))
    for name in range(2, 10):
        ask(scheduler, name, 100, max_tokens=20 + name)
    step(scheduler)
    ask(scheduler, 1, tokens, beams=Beams(count=8))
    for name in range(10, 200):  # one after another takes the place of one that ends
        ask(scheduler, name, 100, max_tokens=30)
        step(scheduler)
        if scheduler._by_id[1].computed:
            break
    assert name < 60


def test_admitted_prompts_finish_without_giving_way_to_each_other() -> None:
    scheduler = make(pages=601)
    for name in range(12):
        ask(scheduler, name, 3000, max_tokens=1)
    steps_until(scheduler, lambda: not scheduler._by_id)
    assert scheduler.preemptions == 0


def test_a_middling_prompt_enters_beside_as_many_long_ones_as_there_may_be() -> None:
    scheduler = make(pages=5000, max_prefills=8, pace=Pace(0.05))
    for name in range(8):
        ask(scheduler, name, LONG)
    for _ in range(20):
        paced(scheduler, 1.0)
    assert scheduler.pace.allowance == LEAST
    ask(scheduler, 10, 200)  # more than the steps of a short one
    assert steps_until(scheduler, lambda: scheduler._by_id[10].output_len > 0) <= 200 / (LEAST / 2) + 1


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


def paced(scheduler: Scheduler, seconds_per_token: float) -> dict[int, int]:
    """One step that takes so long per prompt token."""
    before = {name: sequence.computed for name, sequence in scheduler._by_id.items()}
    computed = step(scheduler)
    work = Work.of((before[name], tokens) for name, tokens in computed.items() if tokens > 1)
    scheduler.pace.observe(work, 0, work.tokens * seconds_per_token)
    return computed


def test_a_short_prompt_has_the_next_step_to_itself() -> None:
    scheduler = make(pace=Pace(0.05))
    for name in range(2):
        ask(scheduler, name, LONG)
    for _ in range(5):
        paced(scheduler, 0.001)
    ask(scheduler, 10, 40)
    assert step(scheduler) == {10: 40}
    # What takes some steps is short as well.
    ask(scheduler, 11, 128)
    assert [step(scheduler) for _ in range(3)] == [{10: 1, 11: 48}, {10: 1, 11: 48}, {10: 1, 11: 32}]
    assert set(step(scheduler)) == {0, 1, 11}


def test_a_long_prompt_has_larger_chunks_while_it_holds_up_nothing() -> None:
    now = [0.0]
    scheduler = make(pace=Pace(0.05), clock=lambda: now[0])
    ask(scheduler, 9, 16, max_tokens=1)
    assert step(scheduler) == {9: 16}
    ask(scheduler, 0, LONG)
    usual = paced(scheduler, 0.05 / FIRST)[0]
    assert usual <= FIRST
    now[0] += QUIET
    assert step(scheduler)[0] > 1.5 * usual
    ask(scheduler, 1, 16, max_tokens=3)
    assert step(scheduler) == {1: 16}
    now[0] += QUIET
    while 1 in scheduler._by_id:  # it decodes
        assert step(scheduler)[0] <= usual
    assert step(scheduler)[0] > 1.5 * usual


def test_a_prompts_own_arrival_holds_up_nothing() -> None:
    scheduler = make(pace=Pace(0.05), clock=lambda: 0.0)
    ask(scheduler, 0, LONG)
    # Unless nothing is known yet of how long a step takes.
    assert paced(scheduler, 0.05 / FIRST)[0] <= FIRST
    assert step(scheduler)[0] > 1.5 * FIRST
    ask(scheduler, 1, 16, max_tokens=1)
    assert step(scheduler) == {1: 16}
    assert step(scheduler)[0] <= FIRST


def test_the_most_urgent_prompt_waits_for_a_few_short_ones_and_then_for_every_other() -> None:
    scheduler = make(pace=Pace(0.05))
    ask(scheduler, 0, LONG)
    chunks = []
    for name in range(1, 60):
        ask(scheduler, name, 100, max_tokens=1)
        chunks.append(step(scheduler).get(0, 0))
    assert chunks[:PATIENCE] == [0] * PATIENCE
    assert [chunk >= FIRST / 4 for chunk in chunks[PATIENCE:]] == [True, False] * 27 + [True]


def test_a_prefix_that_was_found_late_does_not_leave_a_step_empty() -> None:
    # With tokens that cost nine times as much after the prefix than at the start.
    scheduler = make(max_running=1, pace=Pace(0.04, 1000.0), clock=lambda: 0.0)
    prefix = list(range(8192))
    for name in (1, 2):
        prompt = [*prefix, *[10_000 + name] * 200]
        scheduler.add(Submit(id=name, prompt=prompt, sampling=Sampling(), max_tokens=2))
    steps_until(scheduler, lambda: not scheduler._by_id)  # checks each


def test_a_short_prompt_that_cannot_enter_does_not_hold_up_a_long_one() -> None:
    scheduler = make(pages=601, pace=Pace(0.05))
    ask(scheduler, 0, 5000)
    step(scheduler)
    ask(scheduler, 1, 4900)
    ask(scheduler, 2, 64)
    for _ in range(20):
        assert 0 in step(scheduler)


@pytest.mark.parametrize("target", [0.02, 0.05])
def test_prompts_take_about_as_long_as_they_should_while_tokens_grow_dearer(target: float) -> None:
    pace, seen, durations = Pace(target), 0, []
    pace.observe(Work(0, 0), 8, 0.01)

    def seconds(start: int, tokens: int) -> float:
        return 0.002 + tokens * (3e-4 + 1.5e-7 * (start + tokens / 2))

    while seen < LONG:
        tokens = max(MULTIPLE, pace.tokens(seen, pace.allowance or 0))
        pace.observe(Work.of([(seen, tokens)]), 8, seconds(seen, tokens) + 0.01)
        durations.append(seconds(seen, tokens))
        seen += tokens
    steady = durations[4:]
    assert max(steady) < max(1.4 * target, seconds(LONG, MULTIPLE))
    assert sum(steady) / len(steady) == pytest.approx(target, rel=0.2)
    # A token at the start of another prompt is known to cost less: here a fifth, and up to a third where
    # the 2 ms of every step count much.
    assert 3 < pace.cost(LONG, 1) / pace.cost(0, 1) < 5.2
    short = pace.tokens(0, pace.allowance or 0)
    assert 0.5 * target < seconds(0, short) < 1.3 * target


def test_one_slow_step_does_not_make_the_next_ones_tiny_nor_does_a_small_one() -> None:
    pace = Pace(0.05)
    assert pace.allowance == FIRST
    pace.observe(Work(FIRST, 0), 0, 5.0)
    assert pace.allowance == FIRST / 2
    pace.observe(Work(2, 0), 0, 0.02)
    assert pace.allowance == FIRST / 2
    pace.observe(Work(FIRST // 2, 0), 0, 0.0)
    assert pace.allowance == FIRST


@given(
    steps=st.lists(st.tuples(st.integers(2, 512), st.integers(0, 100_000), st.floats(0, 100)), max_size=40),
    start=st.integers(0, 100_000),
    share=st.floats(0.1, 1),
    reach=st.floats(1, 1e6),
)
def test_tokens_cost_what_they_were_chosen_for(steps, start, share, reach) -> None:
    pace = Pace(0.05, reach)
    for tokens, begin, seconds in steps:
        pace.observe(Work.of([(begin, tokens)]), 0, seconds)
    assert pace.allowance is not None
    assert pace.allowance >= LEAST
    cost = share * max(pace.allowance, pace.cost(start, 2 * MULTIPLE))
    tokens = pace.tokens(start, cost)
    assert tokens % MULTIPLE == 0
    assert pace.cost(start, max(0, tokens - MULTIPLE // 2)) <= cost * 1.001
    assert pace.cost(start, tokens + MULTIPLE // 2) >= cost * 0.999
    # Half of what there is at least is a tile, so that the most urgent prompt always goes on.
    assert share < 0.5 or tokens >= MULTIPLE
