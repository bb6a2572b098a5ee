"""The pages that beams hold, copy and leave, and searches that end early, fail or are refused."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
import torch

from server.engine.beam_search import BeamSearch, Continuation
from server.engine.ipc.process import Engine
from server.messages import Beams, FinishReason, StepOutput, Submit
from tests.engine.beams import MOST, PAGE, PROMPTS, generated, submit
from tests.engine.harness import GREEDY, greedy_requests, load, make_core, run
from tests.engine.journal import prompts_of


def test_beams_hold_their_prompt_once(llama):
    core = make_core(llama, page_size=PAGE, prefix_cache=False)
    (prompt,) = prompts_of(60)
    core.submit(submit(1, prompt, 24, num_beams=4))
    most = steps = 0
    while core.has_work:
        core.step()
        steps += 1
        most = max(most, core.kv.pool.held)
    # 7 full pages in common, and of each beam those of 4 tokens of the prompt and of its own.
    assert most <= 7 + 4 * -(-(4 + 24) // PAGE)
    assert steps == 24
    assert core.kv.pool.held == 0


def test_a_preempted_group_computes_what_its_beams_share_once(llama, own):
    core = make_core(llama, page_size=PAGE, pages=60, prefix_cache=False)
    (prompt,) = prompts_of(100)
    computed = []
    launch = core.runner.launch

    def counted(scheduled, before=None):
        computed.append(sum(tokens for _, tokens in scheduled))
        return launch(scheduled, before)

    core.runner.launch = counted
    request = submit(1, prompt, 24, num_beams=4)
    core.submit(request)
    for _ in range(10):
        core.step()
    group = core.scheduler._by_id[1]
    assert len(group.parts) == 4
    # A more urgent sequence needs all pages.
    core.submit(Submit(id=2, prompt=prompts_of(350)[0], sampling=GREEDY, max_tokens=1, priority=1))
    core.step()
    assert group.preemptions == 1
    assert not any(part.pages for part in group.parts)
    computed.clear()
    found = []
    while core.has_work:
        found += core.step().sequences
    rest = sum(computed) - 4 * 14
    assert 100 <= rest <= 100 + 4 * 10
    (end,) = [output for output in found if output.id == 1 and output.finish]
    assert [end.tokens] == generated(own, prompt, 24, num_beams=4)
    assert end.preemptions == 1


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_copied_pages_are_the_same_in_every_format(llama, kv_dtype):
    """The search that copies pages finds what one finds whose pages end where its beams part."""
    (prompt,) = prompts_of(13)
    found = []
    for page_size in (1, PAGE):
        core = make_core(llama, page_size=page_size, kv_dtype=kv_dtype, kernel="reference")
        found.append(run(core, [submit(1, prompt, 12, num_beams=4)])[1].tokens)
    assert found[0] == found[1]


def test_packed_layers_read_the_copies(llama_folder):
    core = make_core(load(llama_folder, weights="int8"), page_size=PAGE)
    assert core.runner.executor.name == "native"
    requests = [submit(i, prompt, MOST, num_beams=4) for i, prompt in enumerate(PROMPTS[:3])]
    together = run(core, [*requests, *greedy_requests(PROMPTS[3:], MOST, first_id=50)])
    for request in requests:
        without = make_core(load(llama_folder, weights="int8"), page_size=1)
        assert run(without, [request])[request.id].tokens == together[request.id].tokens


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("sliding_window", {"window": "12", "sinks": "4"}),
        ("sparse", {"pattern": "topk", "budget": "16", "recent_pages": "2"}),
    ],
)
def test_beams_under_a_pattern_are_those_of_a_larger_cache(llama, backend, options):
    """Evicted pages and page summaries are beams' as they are sequences'."""
    prompts = prompts_of(40, 23)
    requests = [submit(i, prompt, 20, num_beams=4) for i, prompt in enumerate(prompts)]
    settings = {"page_size": 4, "backend": backend, "options": options, "prefix_cache": False}
    alone = [run(make_core(llama, **settings), [request])[request.id].tokens for request in requests]
    together = run(make_core(llama, pages=80, **settings), requests)
    assert [together[request.id].tokens for request in requests] == alone


def test_an_aborted_search_leaves_nothing(llama):
    core = make_core(llama, page_size=PAGE)
    for steps in range(6):
        core.submit(submit(1, PROMPTS[1], 20, num_beams=4))
        for _ in range(steps):
            core.step()
        core.abort(1)
        assert not core.has_work
        assert core.kv.pool.held == 0
        core.scheduler.check_integrity()


def test_nan_fails_a_search_and_no_other(llama, own):
    core = make_core(llama, page_size=PAGE)
    logits = core.runner.executor.logits

    def broken(step):
        found = logits(step)
        if len(found) == 5:  # one greedy sequence and four beams
            found[-1, 7] = torch.nan
        return found

    core.runner.executor.logits = broken
    (other,) = greedy_requests([PROMPTS[1]], 20, first_id=9)
    outcomes = run(core, [submit(1, PROMPTS[0], 20, n=2, num_beams=4), other])
    assert [outcomes[i].finish for i in (1, 101)] == [FinishReason.FAILED] * 2
    assert [outcomes[9].tokens] == generated(own, PROMPTS[1], 20, num_beams=1)


@pytest.mark.parametrize(
    ("settings", "request_", "sentence"),
    [
        ({"max_running": 3}, {"num_beams": 4}, "too many to run at once"),
        ({"pages": 17}, {"num_beams": 8}, "8 beams can come to hold 33 pages of 16"),
        ({}, {"num_beams": 2, "strings": ["x"]}, "need a tokenizer"),
    ],
)
def test_beams_that_can_not_all_be_there_are_refused(llama, settings, request_, sentence):
    core = make_core(llama, page_size=PAGE, **settings)
    with pytest.raises(ValueError, match=sentence):
        core.submit(submit(1, PROMPTS[0], 30, **request_))


def search(count, penalty, early, max_tokens=10, stops=(0,)):
    beams = Beams(count=count, length_penalty=penalty, early_stopping=early)
    return BeamSearch(
        Submit(
            id=1, prompt=[5], sampling=GREEDY, max_tokens=max_tokens, stop_token_ids=list(stops), beams=beams
        )
    )


def test_a_search_ends_where_no_beam_can_better_the_worst():
    best, other = Continuation(0, 0, -1.0), Continuation(0, 5, -3.0)
    one = search(1, 1.0, "heuristic")
    assert one.advance([best], [other]) == ()
    assert (one.running, one.finished[0].tokens) == ([], [0])
    one = search(1, 2.0, "never")
    one.advance([best], [other])  # -3 / 100 would be better
    assert [beam.tokens for beam in one.running] == [[5]]


def test_each_output_of_a_refused_search_ends(llama):
    sent: list[bytes] = []
    engine = Engine(SimpleNamespace(send=sent.append), None)
    engine._handle(make_core(llama, max_running=3), submit(1, PROMPTS[0], 30, n=2, num_beams=4))
    ends = msgspec.msgpack.decode(sent[0], type=StepOutput).sequences
    assert [(end.id, end.finish) for end in ends] == [(1, FinishReason.FAILED), (101, FinishReason.FAILED)]
