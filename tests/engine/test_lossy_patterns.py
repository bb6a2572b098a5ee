"""Serving under lossy patterns: the tokens that a pattern's rule gives, and the pages that it saves."""

import functools
import random

import pytest
import torch
import transformers

from attention.backends import resolve
from attention.types import LayerSpec
from server.messages import Submit
from tests.cover import every_pair
from tests.engine.harness import GREEDY, Outcome, collect, greedy_requests, load, make_core, run
from tests.models_zoo import save_tiny

WINDOW = {"backend": "sliding_window", "options": {"window": "9", "sinks": "3"}}
SEGMENT = {"backend": "sparse", "options": {"pattern": "segment", "segment": "6", "sinks": "2"}}
BIGBIRD = {
    "backend": "sparse",
    "options": {"pattern": "bigbird", "block": "4", "window_blocks": "2", "random_blocks": "2", "seed": "1"},
}
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("window") / "llama", max_position_embeddings=32768)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def prompts(loaded):
    rng = random.Random(0)
    return [[rng.randrange(4, loaded.vocabulary_size) for _ in range(n)] for n in (1, 4, 13, 30, 71)]


@pytest.fixture(scope="module")
def expected(folder, prompts):
    """Greedy tokens of transformers, which is given the rule as a mask, one token at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    layers = [LayerSpec(0, 4, 2, 16, 16, 0.25)]

    def greedy(prompt, rule):
        tokens = list(prompt)
        for _ in range(MAX_TOKENS):
            at = torch.arange(len(tokens))
            hidden = ~rule.visible(at[:, None], at[None])
            mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([tokens]), attention_mask=mask, use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    @functools.cache
    def of(backend, options):
        rule = resolve(backend, dict(options), "auto", layers, "cpu", torch.float32, 16).pattern
        return [greedy(prompt, rule) for prompt in prompts]

    return lambda attention: of(attention["backend"], tuple(attention["options"].items()))


def tokens_of(outcomes):
    return [outcome.tokens for outcome in outcomes.values()]


@every_pair(
    attention={"window": WINDOW, "segment": SEGMENT, "bigbird": BIGBIRD},
    page_size=[1, 4, 16],
    kernel=["sdpa", "reference"],
)
def test_tokens_follow_the_rule_at_once_and_in_chunks(
    loaded, prompts, expected, kernel, page_size, attention
):
    shape = {"page_size": page_size, "pages": 400 // page_size, "kernel": kernel, **attention}
    tokens = expected(attention)
    for budget in (512, 7):
        core = make_core(loaded, max_batch_tokens=budget, max_running=7, context_length=200, **shape)
        assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == tokens
    again = run(core, greedy_requests(prompts, MAX_TOKENS, first_id=100))
    assert tokens_of(again) == tokens
    if page_size < 16:
        assert again[104].cached_tokens > 0


def test_tokens_follow_the_rule_after_preemption(loaded, prompts, expected):
    core = make_core(
        loaded, page_size=4, pages=22, max_batch_tokens=16, max_running=8, context_length=100, **WINDOW
    )
    tokens = expected(WINDOW)
    outcomes = run(core, greedy_requests(prompts * 2, MAX_TOKENS))
    assert tokens_of(outcomes) == tokens * 2
    urgent = Submit(id=51, prompt=prompts[3], sampling=GREEDY, max_tokens=MAX_TOKENS, priority=1)
    found = {51: Outcome(), **{i: Outcome() for i in range(60, 68)}}
    for request in greedy_requests([prompts[4]] * 8, MAX_TOKENS + 4, first_id=60):
        core.submit(request)
    for _ in range(8):
        collect(core, found)
    core.submit(urgent)
    while core.has_work:
        collect(core, found)
    assert sum(outcome.preemptions for outcome in found.values()) > 0
    assert found.pop(51).tokens == tokens[3]
    assert [long[:MAX_TOKENS] for long in tokens_of(found)] == [tokens[4]] * 8


def test_5000_tokens_stream_through_a_constant_number_of_pages(loaded):
    options = {"window": "64", "sinks": "4"}
    core = make_core(
        loaded,
        page_size=16,
        pages=40,
        max_batch_tokens=64,
        context_length=5000,
        prefix_cache=False,
        backend="sliding_window",
        options=options,
    )
    rng = random.Random(1)
    prompt = [rng.randrange(4, loaded.vocabulary_size) for _ in range(4600)]
    core.submit(greedy_requests([prompt], 400)[0])
    held, outcome = [], {1: Outcome()}
    while core.has_work:
        collect(core, outcome)
        held.append(core.kv.pool.held)
    assert len(outcome[1].tokens) == 400
    assert max(held) <= 1 + 64 // 16 + 64 // 16 + 1
    decoding = held[-400:-1]
    # The sinks' page and those that 64 tokens touch.
    assert set(decoding) <= {1 + 64 // 16, 1 + 64 // 16 + 1}


def test_more_sequences_fit(loaded):
    def running(**attention):
        core = make_core(
            loaded,
            page_size=4,
            pages=101,
            max_batch_tokens=64,
            max_running=32,
            prefix_cache=False,
            **attention,
        )
        found = {i: Outcome() for i in range(1, 17)}
        for request in greedy_requests([[5 + i] * 60 for i in range(16)], 16):
            core.submit(request)
        most = 0
        while core.has_work:
            collect(core, found)
            most = max(most, len(core.scheduler.running))
        return most

    assert running(**WINDOW) >= 2 * running()
