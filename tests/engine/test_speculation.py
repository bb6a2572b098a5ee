"""Drafted tokens change no token, and nothing else that a client or another sequence could see."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.messages import FinishReason, Sampling, Submit
from tests.engine.drafting import KnowingDrafter
from tests.engine.harness import GREEDY, greedy_requests, make_core, run
from tests.engine.harness import load as loaded_from
from tests.engine.journal import DRAWN, PENALIZED, RandomLoad, prompts_of
from tests.engine.remembering import CONTEXT, SMALL, VOCABULARY, remembering
from tests.models_zoo import VOCABULARY as WORDS
from tests.models_zoo import save_tiny

WINDOW = {"backend": "sliding_window", "options": {"window": "5", "sinks": "2"}}
LONGROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 48,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 48,
    },
}


def outputs_of(outcomes):
    return {i: outcome.tokens for i, outcome in outcomes.items()}


@settings(max_examples=8, deadline=None)
@given(
    **SMALL,
    window=st.booleans(),
    most=st.integers(1, 9),
    wrong=st.sampled_from([0.0, 0.2, 0.9]),
)
def test_random_requests_and_aborts(
    seed, pages, page_size, max_running, extra_budget, prefix_cache, window, most, wrong
):
    loaded = remembering()
    loaded.model.table[::61] = torch.nan  # such a sequence fails, drafted or not
    rule = WINDOW if window else {}
    context = min(CONTEXT, (pages - 1) * page_size)
    rng = random.Random(seed)
    load = RandomLoad(rng, VOCABULARY, context, penalized=seed % 3 == 0)
    expected = run(make_core(loaded, prefix_cache=False, context_length=context, **rule), load.requests)
    core = make_core(
        loaded,
        pages=pages,
        page_size=page_size,
        max_running=max_running,
        max_batch_tokens=max_running + extra_budget,
        prefix_cache=prefix_cache,
        context_length=context,
        drafter=KnowingDrafter(outputs_of(expected), most, context, wrong, rng, VOCABULARY),
        **rule,
    )
    load.serve(core, expected)


@pytest.mark.parametrize("wrong", [0.0, 0.7])
@pytest.mark.parametrize(
    "rule", [{}, {"backend": "sliding_window", "options": {"window": "24", "sinks": "3"}}]
)
def test_native_steps_give_the_same_to_the_last_bit(packed, rule, wrong):
    """Log probabilities tell of every bit of the rows' logits."""
    requests = [
        Submit(id=i, prompt=prompt, sampling=sampling, max_tokens=40, logprobs=3, prompt_logprobs=1)
        for i, (prompt, sampling) in enumerate(
            zip(prompts_of(3, 61, 17, 33, 90), [*DRAWN, PENALIZED], strict=True)
        )
    ]
    # Drafts of several pages, in batches that are advanced, and of one.
    core = {"max_batch_tokens": 64, "prefix_cache": False, "page_size": 2 if wrong else 16, **rule}
    plain = run(make_core(packed, **core), requests)
    drafter = KnowingDrafter(outputs_of(plain), 6, 400, wrong, random.Random(0), WORDS)
    if wrong:
        drafter.wanted = lambda sequence, room, least: room  # as many in each step
    drafting = make_core(packed, **core, drafter=drafter)
    assert drafting.runner.executor.name == "native"
    assert run(drafting, requests) == plain
    stats = drafting.stats()
    assert stats.draft_tokens > 60
    assert (stats.accepted_draft_tokens == stats.draft_tokens) == (wrong == 0)


def test_greedy_drafts_are_verified_in_the_output_layer(packed, monkeypatch):
    requests = greedy_requests(prompts_of(3, 61, 17), 40)
    core = {"max_batch_tokens": 64, "prefix_cache": False}
    plain = run(make_core(packed, **core), requests)
    drafter = KnowingDrafter(outputs_of(plain), 6, 400, 0.2, random.Random(0), WORDS)
    drafting = make_core(packed, **core, drafter=drafter)
    found, executor = [], drafting.runner.executor
    most_likely = executor.most_likely
    monkeypatch.setattr(
        executor, "most_likely", lambda step: found.append(len(step.counts)) or most_likely(step)
    )
    assert run(drafting, requests) == plain
    assert max(found) > 3, "rows of drafts too"
    assert drafting.stats().accepted_draft_tokens > 60


def test_nothing_is_drafted_where_repeats_are_banned(simple):
    requests = [
        Submit(id=i, prompt=prompt, sampling=Sampling(temperature=0, no_repeat_ngram=2), max_tokens=20)
        for i, prompt in enumerate(prompts_of(5, 8, vocabulary=8))
    ]
    expected = run(make_core(simple), requests)
    drafter = KnowingDrafter(outputs_of(expected), 4, CONTEXT, 0.0, random.Random(1), VOCABULARY)
    core = make_core(simple, drafter=drafter)
    assert run(core, requests) == expected
    assert core.stats().draft_tokens == 0


def test_right_drafts_save_steps_and_wrong_ones_free_their_pages(simple):
    requests = greedy_requests(prompts_of(5, 8, 3, vocabulary=8), 21)
    plain = make_core(simple, page_size=2)
    expected = run(plain, requests)
    published = set(plain.kv.pool._page_of)
    for wrong, most_steps in ((0.0, 9), (1.0, 21)):
        drafter = KnowingDrafter(outputs_of(expected), 4, CONTEXT, wrong, random.Random(1), VOCABULARY)
        core = make_core(simple, page_size=2, drafter=drafter)
        for request in requests:
            core.submit(request)
        steps, outputs = 0, {request.id: [] for request in requests}
        while core.has_work:
            for item in core.step().sequences:
                outputs[item.id] += item.tokens
                assert item.accepted_draft_tokens <= min(item.draft_tokens, len(item.tokens))
            steps += 1
            for sequence in core.scheduler.running:
                assert sequence.computed == sequence.total - 1
                assert len(sequence.pages) == core.kv.pages_for(sequence.computed)
        stats = core.stats()
        assert steps <= most_steps
        # Any token is right now and then.
        least, most = (1.0, 1.0) if wrong == 0 else (0.0, 0.3)
        assert least <= stats.accepted_draft_tokens / stats.draft_tokens <= most
        assert outputs == outputs_of(expected)
        assert set(core.kv.pool._page_of) == published


def test_drafts_take_no_page_that_another_sequence_needs(simple):
    """Neither a preemption nor a later start follows from them."""
    requests = greedy_requests(prompts_of(9, 7, 5, vocabulary=8), 12)
    room = {"page_size": 2, "pages": 24, "prefix_cache": False, "context_length": 40}
    plain = make_core(simple, **room)
    expected = run(plain, requests)
    drafter = KnowingDrafter(outputs_of(expected), 9, 40, 0.5, random.Random(1), VOCABULARY)
    core = make_core(simple, **room, drafter=drafter)
    assert outputs_of(run(core, requests)) == outputs_of(expected)
    assert core.scheduler.preemptions <= plain.scheduler.preemptions
    assert core.stats().accepted_draft_tokens > 5


def test_frequencies_that_change_with_the_length(tmp_path):
    """All keys are computed again at the 49th token, which no draft may pass."""
    loaded = loaded_from(save_tiny("llama", tmp_path, **LONGROPE))
    requests = greedy_requests(prompts_of(30, 44, 60), 30)
    plain = run(make_core(loaded), requests)
    core = make_core(loaded)
    assert core.runner.rope is not None
    core.drafter = KnowingDrafter(outputs_of(plain), 7, 128, 0.2, random.Random(0), WORDS, core.runner.rope)
    assert outputs_of(run(core, requests)) == outputs_of(plain)
    assert core.stats().accepted_draft_tokens > 20


def test_a_sequence_that_starts_again_wants_no_drafts(simple):
    """Else it gets those that it wanted with other frequencies, where its tokens are in the prefix cache."""
    (request,) = greedy_requests(prompts_of(5, vocabulary=8), 12)
    core = make_core(simple, drafter=KnowingDrafter({1: []}, 4, CONTEXT, 1.0, random.Random(1), VOCABULARY))
    core.submit(request)
    core.step()
    (sequence,) = core.scheduler.running
    core.drafter.wanted = lambda sequence, room, least: room
    core.step()
    assert sequence.wanted_drafts == 4
    core.scheduler.restart(sequence)
    assert sequence.wanted_drafts == 0


def test_a_stop_token_ends_the_output_within_its_draft(simple):
    prompt = prompts_of(6, vocabulary=8)[0]
    whole = run(make_core(simple), greedy_requests([prompt], 20))[1].tokens
    request = Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=20, stop_token_ids=[whole[5]])
    drafter = KnowingDrafter({1: whole}, 15, CONTEXT, 0.0, random.Random(0), VOCABULARY)
    outcome = run(make_core(simple, drafter=drafter), [request])[1]
    end = whole.index(whole[5]) + 1
    assert (outcome.tokens, outcome.finish) == (whole[:end], FinishReason.STOP)
