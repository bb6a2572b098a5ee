"""Priorities: a more urgent request overtakes others at once, and waiting makes every request more urgent."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.kv_manager import KVManager
from server.engine.pace import MULTIPLE, Pace
from server.engine.scheduler import Scheduler
from server.submit import Beams
from tests.engine import pretended

AGING = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, aging: float | None = AGING, pages: int = 1000, **settings: Any) -> Scheduler:
    kv = KVManager(pages, 16, prefix_cache=False)
    return Scheduler(kv, settings.pop("max_running", 8), 512, aging=aging, clock=clock, **settings)


def ask(scheduler: Scheduler, name: int, tokens: int = 20, **more: Any) -> None:
    pretended.ask(scheduler, name, tokens, **more)


def step(scheduler: Scheduler) -> dict[int, int]:
    computed = pretended.step(scheduler)
    scheduler.check_integrity()
    return computed


def waiting(scheduler: Scheduler) -> list[int]:
    return [sequence.id for sequence in scheduler.waiting]


@pytest.mark.parametrize("pace", [None, 0.05])
def test_a_more_urgent_prompt_overtakes_those_that_are_computed(pace: float | None) -> None:
    scheduler = make(Clock(), pace=Pace(pace))
    for name in range(3):
        ask(scheduler, name, 4000)
    step(scheduler)
    ask(scheduler, 10, 1024, priority=1)
    steps = []
    while scheduler._by_id[10].output_len == 0:
        steps.append(step(scheduler))
    # Others get what it can't take: the rest of the last step, and parts of a kernel's tile.
    assert all(sum(computed.values()) - computed[10] <= MULTIPLE for computed in steps[:-1])
    assert len(steps) == 2 if pace is None else 8 < len(steps) < 12  # later tokens cost more


def test_requests_that_came_long_before_go_before_more_urgent_ones() -> None:
    clock = Clock()
    scheduler = make(clock, max_running=1)
    ask(scheduler, 0, max_tokens=100)
    step(scheduler)
    for name, after, priority in ((1, 1, -1), (2, 2, 0), (3, 3, 1), (4, 14, 1), (5, 15, 2), (6, 40, 1)):
        clock.now = 1e6 + after
        ask(scheduler, name, priority=priority)
    # In seconds after the first, each level of priority being worth 10: 1 comes at 11, 2 at 2, 3 at -7, ...
    assert waiting(scheduler) == [3, 5, 2, 4, 1, 6]


def test_a_stream_of_urgent_requests_starves_no_other() -> None:
    clock = Clock()
    scheduler = make(clock, max_running=2)
    ask(scheduler, 0, priority=0)
    name = 0
    while 0 in scheduler._by_id:
        # Always more of them than there is room for.
        while len(scheduler._by_id) < 6:
            name += 1
            ask(scheduler, name, priority=2)
        step(scheduler)
        clock.now += 0.1
    # Those that came in its first 20 seconds went before it, and those that then were in the queue.
    assert 20 <= clock.now - 1e6 <= 20 + 6 * 4 * 0.1 + 1


def test_without_aging_a_lower_priority_waits_for_all_higher_ones() -> None:
    clock = Clock()
    scheduler = make(clock, aging=None, max_running=2)
    ask(scheduler, 0, priority=0)
    for name in range(1, 500):
        while len(scheduler._by_id) < 6:
            ask(scheduler, name * 10 + len(scheduler._by_id), priority=1)
        step(scheduler)
        clock.now += 10
    assert scheduler._by_id[0].computed == 0


def test_what_has_waited_long_enough_does_not_give_way() -> None:
    clock = Clock()
    scheduler = make(clock, max_running=1)
    ask(scheduler, 0, max_tokens=100)
    step(scheduler)
    clock.now += 11
    ask(scheduler, 1, priority=1)
    assert step(scheduler) == {0: 1}
    ask(scheduler, 2, priority=2)
    assert step(scheduler) == {2: 20}
    assert waiting(scheduler) == [0, 1]


def test_waiting_alone_takes_no_place_from_an_equal() -> None:
    clock = Clock()
    scheduler = make(clock, pages=41)
    ask(scheduler, 0, 300, max_tokens=100)
    step(scheduler)
    ask(scheduler, 1, 400)
    clock.now += 100
    ask(scheduler, 2, 20, max_tokens=50)
    for _ in range(20):
        clock.now += 100
        step(scheduler)
    assert scheduler.preemptions == 0
    assert scheduler._by_id[1].computed == 0


def test_none_gives_way_where_that_makes_too_little_room() -> None:
    clock = Clock()
    scheduler = make(clock, pages=41)
    ask(scheduler, 0, 300, priority=1, max_tokens=100)
    ask(scheduler, 1, 100, priority=0, max_tokens=100)
    step(scheduler)
    step(scheduler)
    ask(scheduler, 2, 500, priority=1)
    step(scheduler)
    assert scheduler.preemptions == 0
    assert {s.id for s in scheduler.running} == {0, 1}


def test_none_gives_way_for_pages_that_others_hold_too() -> None:
    scheduler = Scheduler(KVManager(41, 16), 8, 512)
    for name, priority in ((0, 2), (1, 0), (2, 0)):
        ask(scheduler, name, 270, prefix=range(256), priority=priority, max_tokens=100)
        step(scheduler)
    assert scheduler.kv.pool.held == 16 + 3
    # The two that are less urgent have 17 pages each, of which 16 stay the first one's.
    ask(scheduler, 3, 480, priority=1)
    step(scheduler)
    assert scheduler.preemptions == 0
    assert waiting(scheduler) == [3]
    scheduler.remove(0)
    step(scheduler)
    assert scheduler.preemptions == 2
    assert waiting(scheduler) == [1, 2]


def test_as_few_give_way_as_make_room() -> None:
    scheduler = make(Clock(), pages=41)
    for name in range(4):
        ask(scheduler, name, 140, max_tokens=100)
        step(scheduler)
    ask(scheduler, 4, 120, priority=1)
    step(scheduler)
    assert waiting(scheduler) == [3]


def test_all_beams_of_a_search_wait() -> None:
    scheduler = make(Clock(), max_running=4)
    ask(scheduler, 0, max_tokens=100)
    step(scheduler)
    ask(scheduler, 1, beams=Beams(count=4))
    ask(scheduler, 2, beams=Beams(count=2))
    assert len(scheduler.waiting) == 2
    assert scheduler.waiting.sequences == 6
    scheduler.remove(1)
    assert scheduler.waiting.sequences == 2
    step(scheduler)
    assert scheduler.waiting.sequences == 0
