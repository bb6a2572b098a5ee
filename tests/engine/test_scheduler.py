"""The scheduler with a pretended model: what is scheduled, in which order, and that nothing gets lost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kv_manager import KVManager
from server.engine.scheduler import Scheduler
from server.messages import Sampling, Submit


def make(pages=64, page_size=4, max_running=8, max_batch_tokens=16, prefix_cache=True) -> Scheduler:
    return Scheduler(KVManager(pages, page_size, prefix_cache=prefix_cache), max_running, max_batch_tokens)


def ask(scheduler: Scheduler, sequence_id: int, prompt, max_tokens=4, **kwargs) -> None:
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    scheduler.add(Submit(id=sequence_id, prompt=tokens, sampling=Sampling(), max_tokens=max_tokens, **kwargs))


def step(scheduler: Scheduler, token=lambda sequence: 7) -> list[tuple[int, int]]:
    """One step with a model that says ``token``; what was scheduled, as (id, tokens)."""
    scheduled = scheduler.schedule()
    done = [(work.sequence.id, work.tokens) for work in scheduled]
    assert sum(tokens for _, tokens in done) <= scheduler.max_batch_tokens
    scheduler.check_integrity()
    for sequence, tokens in scheduled:
        assert tokens > 0
        assert len(sequence.pages) * scheduler.kv.page_size >= sequence.computed + tokens
        assert 0 not in sequence.pages
        scheduler.kv.advance(sequence, tokens)
        if sequence.remaining == 0:
            sequence.tokens.append(token(sequence))
            if sequence.output_len == sequence.request.max_tokens:
                scheduler.remove(sequence.id)
    scheduler.check_integrity()
    return done


def drain(scheduler: Scheduler, limit=10_000) -> list[list[tuple[int, int]]]:
    steps = []
    while scheduler.running or scheduler.waiting:
        steps.append(step(scheduler))
        assert steps[-1], "sequences are queued, but nothing is scheduled"
        assert len(steps) < limit
    return steps


def test_a_long_prompt_is_computed_in_chunks_and_does_not_delay_decodes() -> None:
    scheduler = make(max_batch_tokens=16)
    ask(scheduler, 1, 3, max_tokens=20)
    step(scheduler)
    ask(scheduler, 2, [9] * 40)
    assert step(scheduler) == [(1, 1), (2, 15)]
    assert step(scheduler) == [(1, 1), (2, 15)]
    assert step(scheduler) == [(1, 1), (2, 10)]
    assert step(scheduler) == [(1, 1), (2, 1)]


def test_a_prefix_hit_leaves_at_least_one_token_to_compute() -> None:
    scheduler = make(page_size=4)
    prompt = list(range(8))
    ask(scheduler, 1, prompt)
    drain(scheduler)
    ask(scheduler, 2, prompt)
    assert step(scheduler) == [(2, 4)]
    assert scheduler.running[0].cached_tokens == 4
    assert (scheduler.kv.prefix_queries, scheduler.kv.prefix_hits) == (16, 4)


def test_output_is_found_again_by_the_next_turn_of_a_conversation() -> None:
    scheduler = make(page_size=4)
    ask(scheduler, 1, [1, 2, 3], max_tokens=6)
    drain(scheduler)
    ask(scheduler, 2, [1, 2, 3, 7, 7, 7, 7, 7, 9, 9])
    assert step(scheduler) == [(2, 2)]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_of_one_prompt_share_its_pages(prefix_cache: bool) -> None:
    scheduler = make(page_size=4, max_batch_tokens=16, prefix_cache=prefix_cache)
    ask(scheduler, 1, 10)
    for sample in (2, 3):
        ask(scheduler, sample, 10, leader=1)
    assert step(scheduler) == [(1, 10)]
    assert step(scheduler) == [(1, 1), (2, 1), (3, 1)]
    assert scheduler.running[0].pages[:2] == scheduler.running[1].pages[:2] == scheduler.running[2].pages[:2]


def test_a_sample_writes_to_no_page_that_can_be_found() -> None:
    """It gets one that its leader has filled and published, and has it alone when it goes on."""
    scheduler = make(page_size=4, max_batch_tokens=8, max_running=2)
    ask(scheduler, 1, 6, max_tokens=9)
    ask(scheduler, 3, [9] * 3, max_tokens=4)
    ask(scheduler, 2, 6, leader=1)
    while len(scheduler._by_id) == 3:
        step(scheduler)
    kv, (leader, sample) = scheduler.kv, (scheduler._by_id[name] for name in (1, 2))
    scheduler._sharing.begin(sample)
    published = leader.pages[1]
    assert sample.pages == leader.pages[:2]
    kv.release(leader)
    assert kv.extend(sample, 1)
    assert sample.pages[1] != published
    assert kv.take_copies() == {sample.pages[1]: published}


@pytest.mark.parametrize(("pages", "enter"), [(4, False), (6, True)])
def test_a_sample_enters_where_there_is_room_for_its_copy_of_a_page(pages: int, enter: bool) -> None:
    """And for the next page of the one that gives it the others."""
    scheduler = make(pages=pages, page_size=4, prefix_cache=False)
    ask(scheduler, 1, 7, max_tokens=5)
    ask(scheduler, 2, 7, max_tokens=5, leader=1)
    step(scheduler)
    assert step(scheduler) == [(1, 1), (2, 1)][: 1 + enter]
    drain(scheduler)
    assert scheduler.preemptions == 0


def test_samples_do_not_wait_for_a_leader_that_is_gone() -> None:
    scheduler = make()
    ask(scheduler, 1, 10)
    ask(scheduler, 2, 10, leader=1)
    scheduler.remove(1)
    assert step(scheduler) == [(2, 10)]


def test_higher_priority_is_admitted_first_and_takes_the_place_of_lower() -> None:
    scheduler = make(max_running=1, max_batch_tokens=16)
    ask(scheduler, 1, 3, max_tokens=50)
    step(scheduler)
    ask(scheduler, 2, 3, priority=0)
    ask(scheduler, 3, [5] * 3, priority=1)
    assert step(scheduler) == [(3, 3)]
    assert [sequence.id for sequence in scheduler.waiting] == [1, 2]
    assert next(iter(scheduler.waiting)).preemptions == 1


def test_equal_priority_never_preempts_to_be_admitted() -> None:
    scheduler = make(max_running=1)
    ask(scheduler, 1, 3, max_tokens=50)
    step(scheduler)
    ask(scheduler, 2, 3)
    assert step(scheduler) == [(1, 1)]
    assert scheduler.preemptions == 0


def test_short_of_pages_the_latest_gives_way_and_resumes_with_its_output() -> None:
    scheduler = make(pages=7, page_size=2, prefix_cache=False)
    ask(scheduler, 1, 4, max_tokens=8)
    ask(scheduler, 2, [8] * 2, max_tokens=8)
    steps = drain(scheduler)
    assert scheduler.preemptions > 0
    assert scheduler.kv.pool.held == 0
    # 2 was computed again with the output that it had, in one go.
    assert any(sequence == 2 and tokens > 2 for done in steps for sequence, tokens in done)


def test_prompt_logprobs_are_really_computed_despite_a_cached_prefix() -> None:
    scheduler = make(page_size=4)
    ask(scheduler, 1, 12)
    drain(scheduler)
    ask(scheduler, 2, 12, prompt_logprobs=1)
    assert step(scheduler) == [(2, 12)]


def test_a_budget_below_the_running_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        make(max_running=8, max_batch_tokens=7)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    pages=st.integers(8, 40),
    page_size=st.integers(1, 5),
    max_running=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    prefix_cache=st.booleans(),
)
def test_everything_finishes_and_no_page_leaks(
    seed, pages, page_size, max_running, extra_budget, prefix_cache
):
    rng = random.Random(seed)
    scheduler = make(pages, page_size, max_running, max_running + extra_budget, prefix_cache)
    capacity = scheduler.kv.pool.total * page_size
    outputs: dict[int, int] = {}
    waiting = list(range(1, 15))
    for _ in range(3000):
        if waiting and rng.random() < 0.4:
            new = waiting.pop()
            length = rng.randint(1, max(1, capacity - 2))
            prompt = [rng.choice([0, 0, 0, 1]) for _ in range(length)]
            ask(
                scheduler,
                new,
                prompt,
                max_tokens=rng.randint(1, max(1, min(12, capacity - length))),
                priority=rng.randint(0, 1),
                leader=rng.choice([None, new + 1]),
            )
            outputs[new] = 0
        if scheduler.running and rng.random() < 0.05:
            gone = rng.choice([*scheduler.running, *scheduler.waiting]).id
            scheduler.remove(gone)
            del outputs[gone]
        if scheduler.running or scheduler.waiting:
            assert step(scheduler, token=lambda s: s.total % 2)
        elif not waiting:
            break
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.kv.pool.held == 0
