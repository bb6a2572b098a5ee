"""A step launched before the one before it is collected: the same tokens, steps and pages as without."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.messages import FinishReason, Submit
from tests.engine.harness import GREEDY, greedy_requests, make_core, run
from tests.engine.journal import DRAWN, Journal, RandomLoad, isolated, launched_ahead, prompts_of, told
from tests.engine.remembering import CONTEXT, SMALL, VOCABULARY, remembering


def without_logprobs(steps):
    return [[(item[0], item[1], *item[4:]) for item in step] for step in steps]


def logprobs_in(steps):
    positions = [p for step in steps for item in step for part in item[2:4] for p in part or []]
    return [entry.logprob for p in positions for entry in (p.chosen, *p.top)]


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("full", {}),
        ("sliding_window", {"window": "9", "sinks": "3"}),
        ("sparse", {"pattern": "topk", "budget": "16", "recent_pages": "1"}),
        ("sparse", {"pattern": "lsh", "hashes": "2", "buckets": "16", "window": "6"}),
    ],
)
def test_every_step_tells_the_same(llama, backend, options):
    """Chunks of prompts, log probabilities, greedy and drawn, ends by length and by stop tokens."""
    core = {
        "page_size": 4,
        "max_batch_tokens": 24,
        "max_running": 6,
        "backend": backend,
        "options": options,
        "prefix_cache": False,
    }
    requests = [
        Submit(
            id=i,
            prompt=prompt,
            sampling=DRAWN[i % 4],
            max_tokens=[1, 2, 9, 14][i % 4],
            logprobs=[None, 2][i % 2],
            prompt_logprobs=[None, None, 1][i % 3],
        )
        for i, prompt in enumerate(prompts_of(3, 30, 5, 41, 1, 17))
    ]
    plain = told(make_core(llama, **core), requests)
    outputs = [[t for steps in plain for item in steps if item[0] == i for t in item[1]] for i in range(6)]
    # Each may end anywhere by a token of its own.
    requests = [
        msgspec.structs.replace(request, stop_token_ids=outputs[i][i % 4 + 1 : i % 4 + 2])
        for i, request in enumerate(requests)
    ]
    plain = told(make_core(llama, **core), requests)
    assert {item[4] for steps in plain for item in steps} >= {FinishReason.STOP, FinishReason.LENGTH}
    engine = make_core(llama, **core, ahead=True)
    ahead = launched_ahead(engine)
    found = told(engine, requests)
    assert without_logprobs(found) == without_logprobs(plain)
    # A step ahead may count on a sequence that then ends, so that prompts are cut otherwise.
    assert logprobs_in(found) == pytest.approx(logprobs_in(plain), abs=1e-5)
    # A step after the last one is useful only if no token ends the remaining sequences.
    assert len(plain) - 1 <= len(ahead) <= len(plain)


def test_what_a_step_cost_is_told_with_it(llama):
    requests = greedy_requests(prompts_of(3, 30, 5), 8)

    def figures(ahead: bool) -> list[tuple]:
        core = make_core(llama, page_size=4, max_running=4, max_batch_tokens=16, ahead=ahead)
        for request in requests:
            core.submit(request)
        found, seconds, began = [], 0.0, None
        while core.has_work:
            steps = core.step()
            stats = steps.stats
            seconds += stats.step_seconds
            began = steps.time - stats.step_seconds if began is None else began
            found.append(
                (stats.prompt_tokens, stats.decode_tokens, stats.bytes_moved, stats.flops, stats.pages_read)
            )
        # Steps overlap, and their times must not.
        assert seconds <= steps.time - began + 1e-6
        return found

    assert figures(True) == figures(False)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_requests_that_arrive_and_leave_over_time(simple, prefix_cache):
    requests = [
        Submit(
            id=i,
            prompt=prompt,
            sampling=DRAWN[i % 4] if i % 2 else GREEDY,
            max_tokens=i % 7 + 1,
            stop_token_ids=[i % VOCABULARY],
            priority=i % 2,
        )
        for i, prompt in enumerate(prompts_of(*[1 + 5 * i % 17 for i in range(24)], vocabulary=8))
    ]
    core = make_core(
        simple,
        page_size=2,
        pages=13,
        max_running=5,
        max_batch_tokens=9,
        prefix_cache=prefix_cache,
        ahead=True,
    )
    ahead = launched_ahead(core)
    journal = Journal(core)
    for request in requests:
        journal.submit(request)
        journal.step()
    journal.drain()
    assert sum(ahead) > 20
    assert core.scheduler.preemptions > 0
    for request in requests:
        assert (journal.tokens[request.id], journal.finish[request.id]) == isolated(simple, request)
    journal.check_published()


def test_the_same_pages_are_published_and_evicted(simple):
    """A step later, at most."""
    requests = greedy_requests(prompts_of(5, 8, 3, vocabulary=8), 21)
    for rule in ({}, {"backend": "sliding_window", "options": {"window": "5", "sinks": "2"}}):
        published, held = [], []
        for ahead in (False, True):
            core = make_core(simple, page_size=2, ahead=ahead, **rule)
            for request in requests:
                core.submit(request)
            most = 0
            while core.has_work:
                core.step()
                most = max(most, core.kv.pool.held)
            published.append(set(core.kv.pool._page_of))
            held.append(most)
        assert published[0] == published[1]
        assert len(published[0]) > 3 * 20 // 2
        assert held[0] <= held[1] <= held[0] + len(requests)


@settings(max_examples=12, deadline=None)
@given(
    **SMALL,
    window=st.booleans(),
)
def test_random_requests_and_aborts(seed, pages, page_size, max_running, extra_budget, prefix_cache, window):
    loaded = remembering()
    rule = {"backend": "sliding_window", "options": {"window": "5", "sinks": "2"}} if window else {}
    context = min(CONTEXT, (pages - 1) * page_size)
    load = RandomLoad(random.Random(seed), VOCABULARY, context, penalized=seed % 3 == 0)
    core = make_core(
        loaded,
        pages=pages,
        page_size=page_size,
        max_running=max_running,
        max_batch_tokens=max_running + extra_budget,
        prefix_cache=prefix_cache,
        context_length=context,
        ahead=True,
        **rule,
    )
    expected = run(make_core(loaded, prefix_cache=False, context_length=context, **rule), load.requests)
    load.serve(core, expected)
