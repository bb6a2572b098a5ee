"""Patterns that cover the context give the real default model full attention's tokens."""

import pytest
from transformers import AutoTokenizer

from attention.patterns.sparse import PATTERNS
from loadtest import texts
from loadtest.deployment import Deployment, sparse
from tests.engine.harness import greedy_requests, load, make_core
from tests.engine.harness import run as run_core

# Whole pages, so that answers begin another.
CONTEXT, PROMPT, OUTPUT = 128, 112, 8


def covering(context):
    """Every pattern, with a budget that covers ``context`` tokens."""
    near = {"window": str(context), "sinks": "4"}
    return [
        Deployment("window", "sliding_window", near),
        Deployment("window, in-cache", "sliding_window", {**near, "positions": "cache"}),
        sparse("longformer", "longformer", window=context),
        sparse("segment", "segment", segment=context // 2),
        sparse("bigbird", "bigbird", block=64, window_blocks=context // 64),
        sparse("lsh", "lsh", window=context),
        sparse("top-k, dense prefill", "topk", budget=context, prefill="dense"),
        sparse("top-k, sparse prefill", "topk", budget=context, prefill="sparse"),
    ]


@pytest.fixture(scope="module")
def loaded(default_model):
    return load(default_model)


@pytest.fixture(scope="module")
def prompts(default_model):
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    ids = tokenizer(texts.reference())["input_ids"]
    return [ids[start : start + PROMPT] for start in (0, 5000)]


def greedy(loaded, prompts, **attention):
    core = make_core(loaded, pages=40, **attention)
    return [outcome.tokens for outcome in run_core(core, greedy_requests(prompts, OUTPUT)).values()]


@pytest.fixture(scope="module")
def full(loaded, prompts):
    return greedy(loaded, prompts)


def test_every_pattern_is_held_against_full_attention():
    named = {deployment.options.get("pattern") for deployment in covering(CONTEXT)}
    assert named - {None} == set(PATTERNS)


@pytest.mark.parametrize("deployment", covering(CONTEXT), ids=lambda deployment: deployment.name)
def test_a_pattern_that_covers_the_context_is_full_attention(loaded, prompts, full, deployment):
    assert greedy(loaded, prompts, backend=deployment.attention, options=deployment.options) == full
