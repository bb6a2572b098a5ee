"""Small random models of every common architecture: Longspan's tokens are those of transformers."""

import random

import pytest

from tests.engine.harness import greedy_requests, load, make_core, run, transformers_next
from tests.models_zoo import save_tiny

KINDS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "gpt2",
    "mixtral",
    "stablelm",
    "nemotron",
    "got_ocr2",
    "gemma4_unified",
    "gemma4_unified_text",
]
# The window of those that have one is 8 tokens.
LENGTHS = [1, 17, 60]
MAX_TOKENS = 8


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_transformers(kind, tmp_path):
    folder = save_tiny(kind, tmp_path / kind)
    loaded = load(folder)
    rng = random.Random(kind)
    prompts = [[rng.randrange(4, loaded.vocabulary_size) for _ in range(length)] for length in LENGTHS]
    expected = [
        run(make_core(loaded, page_size=4, pages=64), greedy_requests([prompt], MAX_TOKENS))[1].tokens
        for prompt in prompts
    ]
    assert [len(tokens) for tokens in expected] == [MAX_TOKENS] * len(prompts)
    assert transformers_next(folder, prompts, expected) == expected
    assert len({tuple(tokens) for tokens in expected}) > 1, "a model that repeats one token proves nothing"

    batched = make_core(loaded, page_size=4, pages=128, max_batch_tokens=16, max_running=16)
    outcomes = run(batched, greedy_requests(prompts, MAX_TOKENS))
    assert [outcome.tokens for outcome in outcomes.values()] == expected
    again = run(batched, greedy_requests(prompts, MAX_TOKENS, first_id=100))
    assert [outcome.tokens for outcome in again.values()] == expected
    assert sum(outcome.cached_tokens for outcome in again.values()) > 0


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_reference_kernel_serves_too(kind, tmp_path):
    folder = save_tiny(kind, tmp_path / kind)
    loaded = load(folder)
    prompts = [[7, 8, 9, 10, 11], [20] * 30]
    core = make_core(loaded, page_size=4, pages=64, kernel="reference")
    outcomes = run(core, greedy_requests(prompts, MAX_TOKENS))
    tokens = [outcome.tokens for outcome in outcomes.values()]
    assert [len(output) for output in tokens] == [MAX_TOKENS] * len(prompts)
    assert transformers_next(folder, prompts, tokens) == tokens
