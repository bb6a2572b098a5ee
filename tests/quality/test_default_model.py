"""What patterns do to the real default model: the tests that are small enough for every run."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from attention.kernels.sdpa import Sdpa
from attention.patterns.oracle import Oracle
from attention.patterns.sparse import PATTERNS
from attention.patterns.topk import TopK
from loadtest import texts
from loadtest.quality import checks
from loadtest.quality.deployments import covering
from loadtest.quality.measurement import run
from tests.engine.harness import greedy_requests, load, make_core
from tests.engine.harness import run as run_core

# Whole pages, so that answers begin another.
CONTEXT, PROMPT, OUTPUT = 128, 112, 8


@pytest.mark.stress  # a minute; make quality checks the same and more
def test_sinks_keep_perplexity_and_a_window_finds_what_it_holds():
    """Perplexity at 4,096 tokens and needles at 2,048, on real servers."""
    text = texts.prose(texts.reference())
    wanted = [checks.sinks(text, slices=1), checks.needles_in_noise(keys_per_depth=1)]
    outcomes = run(wanted, ["--kv-memory", "512MiB"], lambda name: None)
    for outcome in outcomes:
        print(f"{outcome.what}: {outcome.measured}; expected: {outcome.expected}")
    assert [outcome for outcome in outcomes if not outcome.passed] == []


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


class Recorded(Sdpa):
    """The kernel, which keeps what the last step's layers were asked."""

    def __init__(self):
        self.asked = {}

    def forward(self, layer, query, cache, batch, pattern, sinks, turned=None):
        slots = torch.arange(batch.seq_lens[0])
        slots = (
            batch.page_table[0, slots // batch.page_size].long() * batch.page_size + slots % batch.page_size
        )
        keys, values = (pages.flatten(0, 1)[slots] for pages in cache[:2])
        self.asked[layer.index] = layer, query.clone(), batch.positions, keys, values
        return super().forward(layer, query, cache, batch, pattern, sinks, turned)


def attend(layer, query, keys, values, seen):
    """``[R, H, D]`` of ``seen`` ``[R, Hkv, L]``, in float64."""
    grouped = query.double().unflatten(1, (layer.kv_heads, -1))
    logits = torch.einsum("rkgd,lkd->rkgl", grouped, keys.double()) * layer.scale
    weights = logits.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
    return torch.einsum("rkgl,lkd->rkgd", weights, values.double()).flatten(1, 2)


def test_the_oracle_is_nearer_to_full_attention_than_top_k_on_real_keys(loaded, default_model):
    """On average, in every layer that chooses by default; not so in the first, whose attention is flat."""
    ids = AutoTokenizer.from_pretrained(default_model)(texts.reference())["input_ids"][:1500]
    core = make_core(loaded, pages=100, max_batch_tokens=50, kernel="sdpa")
    kernel = Recorded()
    core.runner.attention = replace(core.runner.attention, kernel=kernel)
    run_core(core, greedy_requests([ids], 1))
    choosing = [index for index in kernel.asked if index not in TopK.dense_by_default]
    assert len(choosing) == len(loaded.layers) - 2
    for index in choosing:
        layer, query, positions, keys, values = kernel.asked[index]
        assert positions[-1] == len(ids) - 1
        past = (torch.arange(len(keys)) <= positions[:, None])[:, None]
        whole = attend(layer, query, keys, values, past)
        for budget in (128, 512):
            errors = {}
            for kind in (TopK, Oracle):
                pattern = kind(budget, 1, 4, "sparse")
                seen = pattern.chosen(layer, query, positions, keys, core.kv.page_size)
                away = (attend(layer, query, keys, values, seen) - whole).norm(dim=-1)
                errors[kind] = float((away / whole.norm(dim=-1)).mean())
            assert errors[Oracle] < 0.8 * errors[TopK], (index, budget)
