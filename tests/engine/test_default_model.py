"""The real default model: greedy tokens equal those of transformers, however they are scheduled."""

import pydoc_data.topics
import random

import pytest
from transformers import AutoTokenizer

from server.messages import FinishReason, Sampling, Submit
from tests.engine.harness import (
    GREEDY,
    Outcome,
    collect,
    greedy_requests,
    load,
    make_core,
    run,
    transformers_next,
)

pytestmark = pytest.mark.long

PAGE_SIZE = 4
# So many that every sequence goes on into another page.
MAX_TOKENS = PAGE_SIZE + 1
# Word counts of the prompts: a one-word question to a paragraph, so that one batch mixes them.
WORDS = [1, 5, 16, 20, 33, 70]


@pytest.fixture(scope="module")
def prompts(default_model):
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    words = pydoc_data.topics.topics["compound"].split() + pydoc_data.topics.topics["types"].split()
    rng = random.Random(1)
    texts = []
    for count in WORDS:
        start = rng.randrange(len(words) - count)
        texts.append(" ".join(words[start : start + count]))
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def loaded(default_model):
    return load(default_model)


@pytest.fixture(scope="module")
def expected(loaded, prompts):
    """Each prompt's tokens, of one batch; ``test_in_one_batch`` holds them against transformers."""
    core = make_core(loaded, page_size=PAGE_SIZE, max_batch_tokens=8192, prefix_cache=False)
    return tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS)))


def tokens_of(outcomes):
    return [outcome.tokens for outcome in outcomes.values()]


def test_in_one_batch(default_model, prompts, expected):
    assert [len(tokens) for tokens in expected] == [MAX_TOKENS] * len(prompts)
    assert transformers_next(default_model, prompts, expected) == expected


def test_one_by_one(loaded, prompts, expected):
    core = make_core(loaded, page_size=PAGE_SIZE, prefix_cache=False)
    for prompt, tokens in list(zip(prompts, expected, strict=True))[::2]:
        assert run(core, greedy_requests([prompt], MAX_TOKENS))[1].tokens == tokens


def test_with_chunked_prefill(loaded, prompts, expected):
    core = make_core(loaded, page_size=PAGE_SIZE, max_batch_tokens=48, prefix_cache=False)
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == expected


def test_after_preemption(loaded, prompts, expected):
    twice = prompts[2:5] * 2
    # Room for the prompts, and for few of the tokens that follow them.
    pages = sum(-(-len(prompt) // 2) for prompt in twice) + len(twice) + 2
    core = make_core(loaded, page_size=2, pages=pages, prefix_cache=False)
    outcomes = run(core, greedy_requests(twice, MAX_TOKENS))
    assert sum(outcome.preemptions for outcome in outcomes.values()) > 0
    assert tokens_of(outcomes) == expected[2:5] * 2


def test_after_prefix_hits(loaded, prompts, expected):
    core = make_core(loaded, page_size=PAGE_SIZE)
    run(core, greedy_requests(prompts, 1))
    again = run(core, greedy_requests(prompts, MAX_TOKENS, first_id=100))
    assert tokens_of(again) == expected
    for prompt, outcome in zip(prompts, again.values(), strict=True):
        assert outcome.cached_tokens == (len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE


def test_a_seeded_sample_is_the_same_in_any_batch(loaded, prompts):
    request = Submit(
        id=1,
        prompt=prompts[3],
        sampling=Sampling(temperature=0.9, top_p=0.95, seed=77),
        max_tokens=MAX_TOKENS,
    )
    isolated = run(make_core(loaded), [request])[1].tokens
    company = greedy_requests(prompts[:5], MAX_TOKENS, first_id=10)
    core = make_core(loaded, max_batch_tokens=40)
    assert run(core, [*company[:3], request, *company[3:]])[1].tokens == isolated
    other = Submit(
        id=2, prompt=prompts[3], sampling=Sampling(temperature=0.9, seed=78), max_tokens=MAX_TOKENS
    )
    assert run(core, [other])[2].tokens != isolated


def test_logprobs_of_prompt_and_output_agree(loaded, prompts):
    """Greedy output, fed back as a prompt, is the most likely at each position."""
    core = make_core(loaded, max_batch_tokens=32)
    request = Submit(id=1, prompt=prompts[2], sampling=GREEDY, max_tokens=6, logprobs=3, prompt_logprobs=0)
    first = run(core, [request])[1]
    assert len(first.prompt_logprobs) == len(prompts[2]) - 1
    whole = prompts[2] + first.tokens
    echo = run(core, [Submit(id=2, prompt=whole, sampling=GREEDY, max_tokens=1, prompt_logprobs=3)])[2]
    assert [p.chosen.token for p in echo.prompt_logprobs] == whole[1:]
    for generated, echoed in zip(first.logprobs, echo.prompt_logprobs[-6:], strict=True):
        assert echoed.chosen.rank == 1
        assert echoed.chosen.logprob == pytest.approx(generated.chosen.logprob, abs=1e-4)
        assert [t.token for t in echoed.top] == [t.token for t in generated.top]


def test_prompt_logprobs_survive_preemption(loaded, prompts):
    longest = len(prompts[-1]) + MAX_TOKENS
    undisturbed = run(
        make_core(loaded),
        [Submit(id=1, prompt=prompts[-2], sampling=GREEDY, max_tokens=4, prompt_logprobs=1)],
    )[1]
    core = make_core(loaded, pages=longest // 16 + 4, max_batch_tokens=32)
    request = Submit(id=1, prompt=prompts[-2], sampling=GREEDY, max_tokens=4, prompt_logprobs=1)
    urgent = Submit(id=2, prompt=prompts[-1], sampling=GREEDY, max_tokens=4, priority=1)
    outcomes = {1: Outcome(), 2: Outcome()}
    core.submit(request)
    collect(core, outcomes)
    core.submit(urgent)
    while core.has_work:
        collect(core, outcomes)
    assert outcomes[1].preemptions == 1
    assert outcomes[1].tokens == undisturbed.tokens
    assert [p.chosen.token for p in outcomes[1].prompt_logprobs] == prompts[-2][1:]
    for here, there in zip(outcomes[1].prompt_logprobs, undisturbed.prompt_logprobs, strict=True):
        assert here.chosen.logprob == pytest.approx(there.chosen.logprob, abs=1e-4)


def test_abort_frees_pages_at_once(loaded, prompts):
    core = make_core(loaded, prefix_cache=False)
    for request in greedy_requests(prompts[:4], 50):
        core.submit(request)
    core.step()
    assert core.kv.pool.held > 0
    for sequence_id in (1, 2, 3, 4, 99):
        core.abort(sequence_id)
    assert core.kv.pool.held == 0
    assert not core.has_work


def test_stop_tokens_and_lengths(loaded, prompts, expected):
    core = make_core(loaded)
    stop = expected[3][1]
    ends_at = expected[3].index(stop)
    base = {"prompt": prompts[3], "sampling": GREEDY, "stop_token_ids": [stop]}
    outcomes = run(
        core,
        [
            Submit(id=1, max_tokens=MAX_TOKENS, **base),
            Submit(id=2, max_tokens=ends_at + 1, **base),
            Submit(id=3, max_tokens=1, **base),
            Submit(id=4, max_tokens=MAX_TOKENS, min_tokens=ends_at + 3, **base),
        ],
    )
    assert (outcomes[1].tokens, outcomes[1].finish) == (expected[3][: ends_at + 1], FinishReason.STOP)
    assert outcomes[2].finish is FinishReason.STOP
    assert (outcomes[3].tokens, outcomes[3].finish) == (expected[3][:1], FinishReason.LENGTH)
    assert stop not in outcomes[4].tokens[: ends_at + 3]
    assert len(outcomes[4].tokens) > ends_at + 3
    short = make_core(loaded, context_length=len(prompts[3]) + 4)
    ended = run(short, [Submit(id=1, prompt=prompts[3], sampling=GREEDY, max_tokens=50)])[1]
    assert (ended.tokens, ended.finish) == (expected[3][:4], FinishReason.LENGTH)
