"""A step's plan is as much work with thousands of waiting prompts as with a few: counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from server.engine import scheduler as scheduler_module
from server.engine.kv_manager import KVManager
from server.engine.pace import Pace
from server.engine.page_pool import PagePool
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from tests.engine.pretended import ask, step

RUNNING = 8


class Watched(Sequence):
    """A sequence that tells that it is looked at, whatever is asked of it."""

    __slots__ = ()
    seen: ClassVar[set[int]] = set()

    def __getattribute__(self, name: str) -> Any:
        Watched.seen.add(id(self))
        return object.__getattribute__(self, name)


def make(pages: int = 4000, budget: int = 256, seconds: float | None = None) -> Scheduler:
    kv = KVManager(pages, 16)
    return Scheduler(kv, RUNNING, budget, max_prefills=4, pace=Pace(seconds), aging=30, clock=lambda: 0.0)


def all_run(waiting: int) -> Scheduler:
    scheduler = make()
    for name in range(RUNNING):
        ask(scheduler, name, 20, max_tokens=500)
    step(scheduler)
    for name in range(waiting):
        ask(scheduler, 100 + name, 20 + name % 50)
    return scheduler


def long_ones_are_computed(waiting: int) -> Scheduler:
    scheduler = make(seconds=0.04)
    for name in range(waiting + 4):
        ask(scheduler, name, 600)
    return scheduler


def pages_are_short(waiting: int) -> Scheduler:
    scheduler = make(pages=300)
    ask(scheduler, 0, 4000, max_tokens=500)
    while scheduler._by_id[0].output_len == 0:
        step(scheduler)
    ask(scheduler, 1, 1000)
    for name in range(waiting):
        ask(scheduler, 100 + name, 500 + name % 50)
    return scheduler


def none_outranks(waiting: int) -> Scheduler:
    """Those that run came so early that nothing that came since takes their places."""
    scheduler = make()
    for name in range(RUNNING):
        ask(scheduler, name, 20, max_tokens=500)
    step(scheduler)
    scheduler._clock = lambda: 1000.0
    for name in range(waiting):
        ask(scheduler, 100 + name, 20, priority=1 + name % 2)
    return scheduler


def samples(waiting: int) -> Scheduler:
    scheduler = make(budget=64)
    ask(scheduler, 0, 3000)
    for name in range(waiting):
        ask(scheduler, 100 + name, 3000, leader=0)
    return scheduler


@pytest.mark.parametrize("load", [all_run, long_ones_are_computed, pages_are_short, none_outranks, samples])
def test_a_plan_looks_at_no_more_sequences_where_more_of_them_wait(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[int], Scheduler]
) -> None:
    monkeypatch.setattr(scheduler_module, "Sequence", Watched)
    looked_at = {}
    for waiting in (40, 1000):
        scheduler = load(waiting)
        most = 0
        for _ in range(6):
            Watched.seen.clear()
            assert step(scheduler)
            most = max(most, len(Watched.seen))
        looked_at[waiting] = most
        assert len(scheduler.waiting) >= waiting - RUNNING
    # Those that run, the shortest, the most urgent.
    assert looked_at[1000] <= looked_at[40] <= 2 * RUNNING + 1


def test_a_prompt_without_room_is_not_looked_up_again_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = [0]
    find = PagePool.find

    def counted(self: PagePool, keys: Any) -> list[int]:
        keys = list(keys)
        probed[0] += len(keys)
        return find(self, keys)

    monkeypatch.setattr(PagePool, "find", counted)
    scheduler = make(pages=400)
    prefix = tuple(range(3200))
    ask(scheduler, 0, 3210, max_tokens=500, prefix=prefix)
    while scheduler._by_id[0].output_len == 0:
        step(scheduler)
    ask(scheduler, 1, 2400, max_tokens=500)
    while scheduler._by_id[1].output_len == 0:
        step(scheduler)
    probed[0] = 0
    ask(scheduler, 2, 3990)  # lacks more than there is even where the others have ended, but for one
    ask(scheduler, 3, 3600, prefix=prefix)
    once = probed[0]
    assert once == 3989 // 16 + 3599 // 16
    for _ in range(40):
        assert step(scheduler) == {0: 1, 1: 1}
    assert probed[0] == once


def test_pages_that_others_take_meanwhile_make_room_for_a_prompt_that_waits() -> None:
    # 1 and 2 have a prefix that no sequence holds when they come; once 1 holds it, 2 needs no pages for it.
    scheduler = make(pages=300)
    prefix = tuple(range(3200))
    ask(scheduler, 0, 3210, max_tokens=1, prefix=prefix)
    while scheduler._by_id:
        step(scheduler)
    ask(scheduler, 10, 1500, max_tokens=500)
    while scheduler._by_id[10].output_len == 0:
        step(scheduler)
    ask(scheduler, 1, 3300, prefix=prefix)
    ask(scheduler, 2, 3310, prefix=prefix)
    assert step(scheduler) == {10: 1}
    scheduler.remove(10)
    assert step(scheduler) == {1: 100, 2: 110}
