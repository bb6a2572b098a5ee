"""An error in a step ends the sequences that cause it, and no other."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.messages import FinishReason, Submit
from tests.engine.drafting import KnowingDrafter
from tests.engine.harness import GREEDY, make_core, run
from tests.engine.journal import DRAWN, PENALIZED, RandomLoad, prompts_of
from tests.engine.remembering import CONTEXT, SMALL, VOCABULARY, remembering

POISON = 7


def break_on(core, bad, error=RuntimeError("a kernel refuses"), late=False):
    """Steps with a token for which ``bad`` holds raise, before anything is computed, or after all is."""
    executor = core.runner.executor
    for name in ("logits", "most_likely"):

        def broken(step, compute=getattr(executor, name)):
            wrong = any(map(bad, step.ids.tolist()))
            found = compute(step) if late or not wrong else None
            if wrong:
                raise error
            return found

        setattr(executor, name, broken)
    return core


@settings(max_examples=8, deadline=None)
@given(
    **SMALL,
    ahead=st.booleans(),
    drafted=st.booleans(),
    late=st.booleans(),
)
def test_random_requests_beside_such_as_raise(
    seed, pages, page_size, max_running, extra_budget, prefix_cache, ahead, drafted, late
):
    """Every token of this model depends on all before it, so that a wrong key or a token lost shows."""
    loaded = remembering()
    context = min(CONTEXT, (pages - 1) * page_size)
    rng = random.Random(seed)
    load = RandomLoad(rng, VOCABULARY, context, penalized=seed % 3 == 0)
    expected = run(make_core(loaded, prefix_cache=False, context_length=context), load.requests)
    tokens = {i: outcome.tokens for i, outcome in expected.items()}
    drafter = KnowingDrafter(tokens, 3, context, 0.2, rng, VOCABULARY) if drafted and not ahead else None
    core = make_core(
        loaded,
        pages=pages,
        page_size=page_size,
        max_running=max_running,
        max_batch_tokens=max_running + extra_budget,
        prefix_cache=prefix_cache,
        context_length=context,
        ahead=ahead,
        drafter=drafter,
    )
    found = run(break_on(core, lambda token: token == POISON, late=late), load.requests)
    for request in load.requests:
        outcome = found[request.id]
        computed = [*request.prompt, *tokens[request.id][:-1]]
        if drafter is not None and outcome.finish is FinishReason.FAILED:
            assert outcome.tokens == tokens[request.id][: len(outcome.tokens)], "a draft may be what raises"
        elif POISON in computed:
            before = max(0, computed.index(POISON) - len(request.prompt) + 1)
            assert outcome.finish is FinishReason.FAILED
            assert outcome.tokens == tokens[request.id][:before]
        else:
            assert (outcome.finish, outcome.tokens) == (expected[request.id].finish, tokens[request.id])


def test_log_probabilities_of_the_others_are_the_same_to_the_last_bit(packed, caplog):
    requests = [
        Submit(id=i, prompt=prompt, sampling=sampling, max_tokens=20, logprobs=2, prompt_logprobs=1)
        for i, (prompt, sampling) in enumerate(
            zip(prompts_of(5, 61, 17, 33), [*DRAWN[:3], PENALIZED], strict=True)
        )
    ]
    plain = run(make_core(packed), requests)
    poisoned = [*requests, Submit(id=9, prompt=[250, 250, 251], sampling=GREEDY, max_tokens=9)]
    assert not any(250 in request.prompt for request in requests)
    found = run(break_on(make_core(packed), lambda token: token == 250, late=True), poisoned)
    assert found.pop(9).finish is FinishReason.FAILED
    assert found == plain
    assert "sequence 9 fails: its tokens 0 to 2 can't be computed" in caplog.text
    assert "a kernel refuses" in caplog.text, "the traceback"


def test_an_error_of_every_sequence_ends_the_engine(packed):
    core = break_on(make_core(packed), lambda token: True)
    for i in range(3):
        core.submit(Submit(id=i, prompt=[1, 2, 3], sampling=GREEDY, max_tokens=4))
    with pytest.raises(RuntimeError, match="a kernel refuses"):
        core.step()


def test_of_sequences_that_all_raise_the_engine_outlives_all(packed):
    core = break_on(make_core(packed), lambda token: token == 250)
    requests = [Submit(id=i, prompt=[250, i], sampling=GREEDY, max_tokens=4) for i in range(3)]
    assert {one.finish for one in run(core, requests).values()} == {FinishReason.FAILED}
    assert (
        run(core, [Submit(id=7, prompt=[1], sampling=GREEDY, max_tokens=4)])[7].finish is FinishReason.LENGTH
    )


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("an illegal memory access"), AssertionError("a bug")]
)
def test_errors_after_which_nothing_can_be_trusted_end_the_engine(packed, error):
    core = break_on(make_core(packed), lambda token: token == 250, error)
    core.submit(Submit(id=1, prompt=[250], sampling=GREEDY, max_tokens=4))
    core.submit(Submit(id=2, prompt=[1], sampling=GREEDY, max_tokens=4))
    with pytest.raises(type(error)):
        core.step()
