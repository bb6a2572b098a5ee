"""A server under faults, with a pretended model, sockets and time; mistakes made on purpose are found."""

from __future__ import annotations

import os
import random

import pytest

from server.engine import isolated
from server.engine.core import EngineCore
from server.engine.flight import Flight
from server.engine.ipc.wire import Frames
from server.engine.kv_manager import KVManager
from server.engine.page_pool import PagePool
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from tests.engine.simulation.simulate import Result, simulate
from tests.engine.simulation.world import DRAIN

TICKS = 700


def test_faults_come_and_go():
    results = [simulate(seed, TICKS) for seed in range(6)]
    # Each kind of trouble has really been there.
    assert sum(result.ended for result in results) > 400
    assert sum(result.deaths for result in results) > 2
    assert sum(result.preemptions for result in results) > 100
    assert sum(result.given_up for result in results) > 10
    assert sum(result.raised for result in results) > 40


def test_a_seed_gives_the_same_world():
    assert simulate(5, 300) == simulate(5, 300) != simulate(6, 300)


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_a_million_ticks():
    base = int(os.environ.get("LONGSPAN_SEED", random.randrange(2**32)))
    print(f"LONGSPAN_SEED={base}")
    results: list[Result] = []
    while sum(result.ticks for result in results) < 1_000_000:
        results.append(simulate(base + len(results), 10_000))
    print(Result(*map(sum, zip(*results, strict=True))), max(result.longest for result in results))


def leaks(patch):
    release = PagePool.release
    patch.setattr(PagePool, "release", lambda self, pages: release(self, pages[:-1]))


def keeps_pages_of_the_aborted(patch):
    patch.setattr(EngineCore, "abort", lambda self, sequence_id: self.scheduler._by_id.pop(sequence_id, None))


def writes_to_pages_of_other_beams(patch):
    patch.setattr(PagePool, "fixed", lambda self, page: False)


def copies_no_pages(patch):
    patch.setattr(KVManager, "take_copies", lambda self: {})


def holds_no_pages_of_a_fork(patch):
    fork = KVManager.fork

    def careless(self, sequence, other, tokens):
        fork(self, sequence, other, tokens)
        self.pool.release(other.pages)

    patch.setattr(KVManager, "fork", careless)


def gives_dropped_beams_no_end(patch):
    release = KVManager.release
    patch.setattr(KVManager, "release", lambda self, one: one.held_back == 1 or release(self, one))


def parts_beams_where_a_step_raises(patch):
    patch.setattr(
        isolated, "_halves", lambda part: [part[: len(part) // 2], part[len(part) // 2 :]][: len(part) - 1]
    )


def tells_no_router_what_is_evicted(patch):
    patch.setattr(KVManager, "tell", lambda self, events: setattr(self, "_events", events))


def keys_do_not_chain(patch):
    keys = KVManager._keys

    def unchained(self, sequence, count):
        starts = range(0, count * self.page_size, self.page_size)
        pages = [sequence.tokens[start : start + self.page_size] for start in starts]
        sequence.page_keys[:] = [str(page).encode() for page in pages]
        return keys(self, sequence, count)

    patch.setattr(KVManager, "_keys", unchained)


def frees_what_is_seen(patch):
    init = KVManager.__init__

    def early(self, *args, expired, **kwargs):
        init(self, *args, expired=lambda seq_len, size: expired(seq_len + 2 * size, size), **kwargs)

    patch.setattr(KVManager, "__init__", early)


def takes_nothing_back(patch):
    patch.setattr(Flight, "take_back", lambda self, sequence: None)


def keeps_what_was_given_up(patch):
    def keep(self, scheduled, fresh):
        for sequence, tokens in scheduled:
            self.kv.advance(sequence, tokens)

    patch.setattr(EngineCore, "_take_back", keep)


def tells_nothing_of_what_begins_again(patch):
    patch.setattr(EngineCore, "_take_back", lambda self, scheduled, fresh: None)


def forgets_a_victims_state(patch):
    preempt = Scheduler._preempt

    def forgetful(self, sequence, step):
        computed = sequence.computed
        preempt(self, sequence, step)
        sequence.computed = computed

    patch.setattr(Scheduler, "_preempt", forgetful)


def serves_the_latest_first(patch):
    patch.setattr(Sequence, "urgency", property(lambda self: (0, -self.arrival)))


def passes_over_the_most_urgent(patch):
    schedule = Scheduler.schedule

    def unfair(self):
        scheduled = schedule(self)
        leader = min(self.running, key=lambda s: s.urgency)
        return [one for one in scheduled if one.sequence is not leader] or scheduled

    patch.setattr(Scheduler, "schedule", unfair)


def does_not_notice_lost_messages(patch):
    feed = Frames.feed

    def trusting(self, data):
        messages = []
        for byte in data:
            if len(self._pending) == 7:
                self._due = int.from_bytes((*self._pending[4:], byte), "big")
            messages += feed(self, bytes([byte]))
        return messages

    patch.setattr(Frames, "feed", trusting)


# Worlds that show a mistake which the first ones do not. All are tried, should these change.
SHOWN_BY = {
    takes_nothing_back: 5,
    keeps_what_was_given_up: 4,
    tells_nothing_of_what_begins_again: 4,
    serves_the_latest_first: 8,
    does_not_notice_lost_messages: 7,
}


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (leaks, "IntegrityError"),
        (keeps_pages_of_the_aborted, "IntegrityError"),
        (writes_to_pages_of_other_beams, "reads other tokens"),
        (copies_no_pages, "reads other tokens"),
        (holds_no_pages_of_a_fork, "IntegrityError"),
        (gives_dropped_beams_no_end, "IntegrityError"),
        (parts_beams_where_a_step_raises, "beams are parted|AssertionError"),
        (tells_no_router_what_is_evicted, "a page is told of twice|a router knows other pages"),
        (keys_do_not_chain, "reads other tokens|a key stands for two prompts|a page has changed"),
        (frees_what_is_seen, "reads other tokens"),
        (takes_nothing_back, "reads other tokens"),
        (keeps_what_was_given_up, "reads other tokens|IndexError|AssertionError"),
        (tells_nothing_of_what_begins_again, "AssertionError"),
        (forgets_a_victims_state, "IndexError|reads other tokens"),
        (serves_the_latest_first, "starves"),
        (passes_over_the_most_urgent, "passed over"),
        (does_not_notice_lost_messages, "wrong tokens|ends early|started|starves|does not drain"),
    ],
)
def test_a_mistake_is_found(monkeypatch, mistake, complaint):
    def worlds():
        for seed in (SHOWN_BY.get(mistake, 0), *range(30)):
            # More than a request may take, so that one that starves is found.
            simulate(seed, 3 * DRAIN if mistake is serves_the_latest_first else 500)

    mistake(monkeypatch)
    with pytest.raises(AssertionError, match=complaint) as caught:
        worlds()
    assert "python -m tests.engine.simulation" in str(caught.value)
