"""Patterns that cover the context give the real default model full attention's tokens."""

import pytest
import torch
from transformers import AutoTokenizer

from attention.patterns.oracle import Oracle
from attention.patterns.sparse import PATTERNS
from attention.patterns.topk import TopK
from loadtest import texts
from loadtest.deployment import Deployment, sparse
from tests.engine.harness import greedy_requests, load, make_core
from tests.engine.harness import run as run_core
from tests.engine.recorded import last_step

# Whole pages, so that answers begin another.
CONTEXT, PROMPT, OUTPUT = 64, 48, 5


def covering(context):
    """Every pattern, with a budget that covers ``context`` tokens."""
    near = {"window": str(context), "sinks": "4"}
    return [
        Deployment("window", "sliding_window", near),
        Deployment("window, in-cache", "sliding_window", {**near, "positions": "cache"}),
        sparse("longformer", "longformer", window=context),
        sparse("segment", "segment", segment=context // 2),
        sparse("bigbird", "bigbird", block=16, window_blocks=context // 16),
        sparse("lsh", "lsh", window=context),
        sparse("top-k, dense prefill", "topk", budget=context, prefill="dense"),
        sparse("top-k, sparse prefill", "topk", budget=context, prefill="sparse"),
        sparse("oracle", "oracle", budget=context),
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
    core = make_core(loaded, pages=12, **attention)
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


def attend(layer, query, keys, values, seen):
    """``[R, H, D]`` of ``seen`` ``[R, Hkv, L]``, in float64."""
    grouped = query.double().unflatten(1, (layer.kv_heads, -1))
    logits = torch.einsum("rkgd,lkd->rkgl", grouped, keys.double()) * layer.scale
    weights = logits.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
    return torch.einsum("rkgl,lkd->rkgd", weights, values.double()).flatten(1, 2)


def test_the_oracle_is_nearer_to_full_attention_than_top_k_on_real_keys(loaded, default_model):
    """On average, in every layer that selects by default; not so in the first, whose attention is flat."""
    ids = AutoTokenizer.from_pretrained(default_model)(texts.reference())["input_ids"][:560]
    asked = last_step(loaded, ids, rows=40)
    choosing = [index for index in asked if index not in TopK.dense_by_default]
    assert len(choosing) == len(loaded.layers) - 2
    for index in choosing:
        layer, query, positions, keys, values = asked[index]
        assert positions[-1] == len(ids) - 1
        past = (torch.arange(len(keys)) <= positions[:, None])[:, None]
        whole = attend(layer, query, keys, values, past)
        for budget in (128, 192):
            errors = {}
            for kind in (TopK, Oracle):
                pattern = kind(budget, 1, 4, "sparse")
                seen = pattern.selection(layer, query, positions, keys, 16)
                away = (attend(layer, query, keys, values, seen) - whole).norm(dim=-1)
                errors[kind] = float((away / whole.norm(dim=-1)).mean())
            assert errors[Oracle] < 0.8 * errors[TopK], (index, budget)
