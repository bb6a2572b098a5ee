"""Steps ahead that must wait for tokens, or that compute some of theirs for nothing."""

from __future__ import annotations

import msgspec
import torch

from server.engine.kv_manager import KVManager
from server.engine.scheduler import Scheduled, Scheduler
from server.messages import FinishReason, Sampling, Submit
from tests.engine.harness import GREEDY, greedy_requests, make_core, run
from tests.engine.journal import PENALIZED, Journal, isolated, launched_ahead, prompts_of


def test_no_sequence_is_preempted_for_a_step_ahead():
    def scheduled(pages: int, max_running: int = 4) -> tuple[Scheduler, list[Scheduled]]:
        scheduler = Scheduler(KVManager(pages, 2), max_running, 8)
        for request in greedy_requests([[1, 2], [3, 4]], 9):
            scheduler.add(request)
        for sequence, tokens in scheduler.schedule():
            sequence.pending += 1
            scheduler.kv.advance(sequence, tokens)
        return scheduler, scheduler.schedule_ahead(set())

    for pages, expected in ((6, [1, 1]), (5, [1, 1]), (4, [])):
        scheduler, step = scheduled(pages)
        assert [tokens for _, tokens in step] == expected
        assert scheduler.preemptions == 0
        assert len(scheduler.running) == 2
        scheduler.check_integrity()
    # A more urgent sequence needs a place: the tokens will tell whether another has to give way.
    scheduler, _ = scheduled(8, max_running=2)
    for priority, expected in ((0, [1, 1]), (1, [])):
        scheduler.add(Submit(id=7 + priority, prompt=[5], sampling=GREEDY, max_tokens=3, priority=priority))
        assert [tokens for _, tokens in scheduler.schedule_ahead(set())] == expected
        assert scheduler.preemptions == 0
        scheduler.check_integrity()


def test_aborts_at_every_step(simple):
    requests = greedy_requests(prompts_of(3, 9, 4, 14, vocabulary=8), 8)
    expected = {request.id: isolated(simple, request)[0] for request in requests}
    for at in range(10):
        for gone in (1, 2, 4):
            core = make_core(simple, page_size=2, pages=40, max_running=5, max_batch_tokens=8, ahead=True)
            journal = Journal(core)
            for request in requests:
                journal.submit(request)
            for _ in range(at):
                journal.step()
            journal.abort(gone)
            # The pages are free at once, and here they go to another one.
            journal.submit(Submit(id=9, prompt=[3, 3, 1, 0, 2, 2, 5], sampling=GREEDY, max_tokens=3))
            journal.drain()
            assert len(journal.tokens[9]) == 3
            for request in requests:
                tokens = journal.tokens.get(request.id, [])
                assert tokens == expected[request.id][: len(tokens)]
                assert request.id == gone or len(tokens) == 8
            journal.check_published()


def test_when_all_are_gone_nothing_is_left_to_do(simple):
    core = make_core(simple, ahead=True)
    for request in greedy_requests(prompts_of(3, 5, vocabulary=8), 9):
        core.submit(request)
    for _ in range(3):
        core.step()
    core.abort(1)
    core.abort(2)
    assert not core.has_work
    assert core.kv.pool.held == 0
    # The outputs of the step in flight are not taken for those of the new request.
    (late,) = greedy_requests(prompts_of(4, vocabulary=8), 2, first_id=1)
    assert run(core, [late])[1].tokens == isolated(simple, late)[0]


def test_tokens_that_stop_a_sequence_free_its_pages_for_the_next_step(simple):
    (request,) = greedy_requests(prompts_of(6, vocabulary=8), 30)
    tokens, _ = isolated(simple, request)
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    core = make_core(simple, page_size=2, ahead=True)
    journal = Journal(core)
    journal.submit(msgspec.structs.replace(request, stop_token_ids=[stop]))
    ahead = launched_ahead(core)
    journal.drain()
    assert journal.tokens[1] == tokens[: tokens.index(stop) + 1]
    assert journal.finish[1] is FinishReason.STOP
    assert len(ahead) == len(journal.tokens[1])  # the last one for nothing
    journal.check_published()


def test_the_end_by_length_is_foreseen(simple):
    (prompt,) = prompts_of(6, vocabulary=8)
    for request in (
        Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=5),
        Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=999),
    ):
        core = make_core(simple, context_length=16, ahead=True)
        ahead = launched_ahead(core)
        outcome = run(core, [request])[1]
        assert outcome.finish is FinishReason.LENGTH
        assert len(outcome.tokens) == min(request.max_tokens, 10)
        assert len(ahead) == len(outcome.tokens) - 1


def test_a_sequence_with_a_penalty_is_launched_ahead_too(simple):
    requests = greedy_requests(prompts_of(5, 6, vocabulary=8), 12)
    more = (
        PENALIZED,
        Sampling(temperature=0.0, repetition_penalty=5.0),
        Sampling(seed=3, presence_penalty=2),
    )
    requests += [
        msgspec.structs.replace(requests[0], id=10 + i, sampling=sampling, forced=[5, 5][:i])
        for i, sampling in enumerate(more)
    ]
    core = make_core(simple, ahead=True)
    ahead = launched_ahead(core)
    journal = Journal(core)
    for request in requests:
        journal.submit(request)
    journal.drain()
    assert ahead == [5] * 11
    for request in requests:
        assert journal.tokens[request.id] == isolated(simple, request)[0]


def test_a_prompt_waits_for_one_step_more_at_most(simple):
    core = make_core(simple, ahead=True)
    for request in greedy_requests(prompts_of(5, 6, vocabulary=8), 40):
        core.submit(request)
    core.step()
    core.submit(greedy_requests(prompts_of(7, vocabulary=8), 4, first_id=10)[0])
    assert 10 not in {item.id for item in core.step().sequences}  # it was launched before
    assert 10 in {item.id for item in core.step().sequences}


def test_the_more_urgent_still_takes_the_place_of_others(simple):
    core = make_core(simple, max_running=1, ahead=True)
    (slow,) = greedy_requests(prompts_of(5, vocabulary=8), 40)
    core.submit(slow)
    core.step()
    core.submit(greedy_requests(prompts_of(7, vocabulary=8), 4, first_id=10, priority=1)[0])
    assert [[item.id for item in core.step().sequences] for _ in range(3)] == [[1], [10], [10]]
    assert core.scheduler.preemptions == 1


def test_nan_logits_end_their_sequence_only(simple):
    requests = greedy_requests(prompts_of(5, 9, 6, vocabulary=8), 12)
    expected = {request.id: isolated(simple, request)[0] for request in requests}
    core = make_core(simple, page_size=2, ahead=True)
    sample = core.runner._sample

    def spoiled(sequences, logits, before):
        for row, sequence in enumerate(sequences):
            if sequence.id == 2 and sequence.expected >= 9 + 4:
                logits[row] = torch.nan
        return sample(sequences, logits, before)

    core.runner._sample = spoiled
    outcomes = run(core, requests)
    assert outcomes[2].tokens == expected[2][:4]
    assert outcomes[2].finish is FinishReason.FAILED
    for one in (1, 3):
        assert outcomes[one].tokens == expected[one]


def test_steps_are_launched_one_by_one_unless_asked_for(simple):
    core = make_core(simple)
    ahead = launched_ahead(core)
    run(core, greedy_requests(prompts_of(4, 6, vocabulary=8), 7))
    assert not ahead
