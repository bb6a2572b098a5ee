"""Serving under patterns that select by content: the tokens of their definition, and what may be shared."""

import dataclasses
import functools
import random

import pytest
import torch

from attention import BACKENDS, UnsupportedError, resolve
from attention.cache import PagedCache
from attention.kernels.base import spans_within
from attention.kernels.reference import Reference
from attention.patterns.base import ContentPattern
from attention.patterns.blocks import KnownRows
from server.messages import Submit
from tests.engine.harness import GREEDY, Outcome, collect, greedy_requests, load, make_core, run
from tests.models_zoo import save_tiny

PAGE_SIZE = 4
MAX_TOKENS = 8

TOPK = {"pattern": "topk", "budget": "16", "recent_pages": "1", "dense_layers": ""}
SPARSE = {**TOPK, "prefill": "sparse"}
LSH = {"pattern": "lsh", "hashes": "2", "buckets": "16", "window": "6", "sinks": "2"}
ORACLE = {**TOPK, "pattern": "oracle"}
SELECTIONS = {"topk": TOPK, "topk-sparse": SPARSE, "lsh": LSH, "oracle": ORACLE}
DENSE_PREFILL = (TOPK, ORACLE)

every_selection = pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)


class ByDefinition:
    """Attention of a whole sequence at once, under a mask made from ``ContentPattern.selection``."""

    def __init__(self, pattern, layers, prompt_len):
        self.pattern, self.layers, self.prompt_len = pattern, layers, prompt_len

    def attend(self, call):
        layer = self.layers[call.module.layer_idx]
        query, key, value = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
        at = torch.arange(len(query))
        visible = (at <= at[:, None])[:, None].repeat(1, layer.kv_heads, 1)
        if layer.window is not None:
            visible &= (at[:, None] - at < layer.window)[:, None]
        if layer.index not in self.pattern.dense_layers:
            chosen = self.pattern.selection(layer, query, at, key, PAGE_SIZE)
            sees_all = ~self.pattern.selects(at, torch.full_like(at, self.prompt_len))
            visible &= chosen | sees_all[:, None, None]
        group = layer.query_heads // layer.kv_heads
        logits = torch.einsum("rhd,lhd->rhl", query, key.repeat_interleave(group, 1)) * layer.scale
        logits = logits.masked_fill(~visible.repeat_interleave(group, 1), float("-inf"))
        return torch.einsum("rhl,lhd->rhd", logits.softmax(-1), value.repeat_interleave(group, 1))[None]


class Checked(Reference):
    """The reference, which also compares selections from the summaries with those from the keys.

    It looks at each sequence's last row.
    """

    checks = 0

    def forward(self, layer, query, cache, plan, sinks, rerotated=None):
        pattern, batch = plan.pattern, plan.batch.device
        if isinstance(pattern, ContentPattern):
            last = {start - 1: b for b, start in enumerate(plan.batch.host.query_starts)}
            rows = plan.batch.visible.selecting(pattern)
            spans = pattern.select(layer, query[rows], KnownRows(plan.batch.host, batch, rows), cache)
            spans = spans_within(spans, batch.positions[rows], layer.window)
            for row, ranges in zip(rows.tolist(), spans, strict=True):
                if row not in last:
                    continue
                i, b = batch.positions[row : row + 1], last[row] - 1
                at = torch.arange(int(i) + 1)
                slots = batch.page_table[b, at // batch.page_size].long() * batch.page_size
                keys = cache.keys.flatten(0, 1)[slots + at % batch.page_size].nan_to_num(0)
                chosen = pattern.selection(layer, query[row : row + 1], i, keys, batch.page_size)[0]
                if layer.window is not None:
                    chosen &= i - at < layer.window
                inside = (ranges[..., :1] <= at) & (at < ranges[..., 1:])
                assert torch.equal(inside.any(dim=1), chosen)
                self.checks += 1
        return super().forward(layer, query, cache, plan, sinks, rerotated)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(save_tiny("llama", tmp_path_factory.mktemp("content") / "llama", num_hidden_layers=3))


@pytest.fixture(scope="module")
def prompts(loaded):
    rng = random.Random(0)
    return [[rng.randrange(4, loaded.vocabulary_size) for _ in range(n)] for n in (1, 13, 30, 71)]


def greedy_by_definition(model, options, prompt):
    place = ("cpu", torch.float32, PAGE_SIZE)
    pattern = resolve("sparse", options, "reference", model.layers, *place).pattern
    attend = ByDefinition(pattern, {layer.index: layer for layer in model.layers}, len(prompt))
    tokens = list(prompt)
    for _ in range(MAX_TOKENS):
        ids, at = torch.tensor([tokens]), torch.arange(len(tokens))[None]
        with torch.inference_mode():
            logits = model.model(input_ids=ids, position_ids=at, use_cache=False, longspan=attend).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected(loaded, prompts):
    """Greedy tokens of the definition, each recomputed from the whole sequence before it."""

    @functools.cache
    def of(options):
        return [greedy_by_definition(loaded, dict(options), prompt) for prompt in prompts]

    return lambda options: of(tuple(options.items()))


def tokens_of(outcomes):
    return [outcome.tokens for outcome in outcomes.values()]


def core_for(loaded, options, **kwargs):
    shape = {"page_size": PAGE_SIZE, "pages": 150, "max_running": 7, "context_length": 200, **kwargs}
    core = make_core(loaded, backend="sparse", options=options, **shape)
    if kwargs.get("kernel", "reference") == "reference":
        checked = dataclasses.replace(core.runner.attention, kernel=Checked())
        core.runner.attention = core.runner.executor.attention = checked
    return core


@pytest.mark.parametrize("kernel", BACKENDS["sparse"].kernels)
@every_selection
def test_tokens_follow_the_definition_at_once_and_in_chunks(loaded, prompts, expected, kernel, options):
    try:
        resolve("sparse", options, kernel, loaded.layers, "cpu", torch.float32, PAGE_SIZE)
    except UnsupportedError as error:
        pytest.skip(str(error))
    tokens = expected(options)
    core = core_for(loaded, options, kernel=kernel, max_batch_tokens=512 if kernel == "sdpa" else 7)
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == tokens
    if kernel == "reference":
        assert core.runner.attention.kernel.checks > 80
    again = run(core, greedy_requests(prompts, MAX_TOKENS, first_id=100))
    assert tokens_of(again) == tokens
    assert again[103].cached_tokens >= 64


@every_selection
def test_tokens_follow_the_definition_after_preemption(loaded, prompts, expected, options):
    core = core_for(loaded, options, pages=28, max_batch_tokens=16, max_running=8, context_length=100)
    outcomes = run(core, greedy_requests(prompts * 2, MAX_TOKENS))
    assert tokens_of(outcomes) == expected(options) * 2
    assert sum(outcome.preemptions for outcome in outcomes.values()) > 0


@every_selection
def test_a_small_budget_changes_the_tokens(loaded, prompts, expected, options):
    """Otherwise the tests above would compare full attention with itself."""
    assert expected(options)[-1] != expected({**TOPK, "budget": "100"})[-1]


def test_dense_layers(loaded, prompts, expected):
    options = {**TOPK, "dense_layers": "0,2"}
    assert expected(options) != expected(TOPK)
    assert tokens_of(run(core_for(loaded, options), greedy_requests(prompts, MAX_TOKENS))) == expected(
        options
    )


@every_selection
def test_a_prompt_made_of_an_earlier_answer(loaded, prompts, expected, options):
    """Under dense prefill its keys are others than the answer's own; else the answer's pages are found."""
    core = core_for(loaded, options)
    prompt = prompts[2]
    (answer,) = tokens_of(run(core, greedy_requests([prompt], MAX_TOKENS)))
    longer = prompt + answer[:-1]
    found = run(core, greedy_requests([longer], MAX_TOKENS, first_id=2))[2]
    assert found.tokens == greedy_by_definition(loaded, options, longer)
    whole_pages = len(prompt if options in DENSE_PREFILL else longer) // PAGE_SIZE
    assert found.cached_tokens == whole_pages * PAGE_SIZE


@every_selection
def test_an_answer_that_was_a_prompt_before(loaded, prompts, expected, options):
    """A preempted sequence must not find its answer's pages among those of another's prompt."""
    core = core_for(loaded, options, max_running=1)
    prompt, answer = prompts[2], expected(options)[2]
    run(core, greedy_requests([prompt + answer], 1))
    outcomes = {2: Outcome(), 3: Outcome()}
    core.submit(greedy_requests([prompt], MAX_TOKENS, first_id=2)[0])
    while len(outcomes[2].tokens) < MAX_TOKENS - 1:
        collect(core, outcomes)
    core.submit(Submit(id=3, prompt=prompts[1], sampling=GREEDY, max_tokens=2, priority=1))
    hits = core.kv.prefix_hits
    while core.has_work:
        collect(core, outcomes)
    assert outcomes[2].preemptions == 1
    assert outcomes[2].tokens == answer
    known = len(prompt) if options in DENSE_PREFILL else len(prompt) + MAX_TOKENS - 2
    assert core.kv.prefix_hits - hits == known // PAGE_SIZE * PAGE_SIZE


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return load(save_tiny("mistral", tmp_path_factory.mktemp("windowed"), sliding_window=24))


@every_selection
def test_a_model_with_a_window_of_its_own(windowed, options):
    """Its pages expire, and those behind the window are not selected."""
    rng = random.Random(2)
    prompts = [[rng.randrange(4, windowed.vocabulary_size) for _ in range(n)] for n in (9, 60)]
    core = core_for(windowed, options, max_batch_tokens=16)
    tokens = [greedy_by_definition(windowed, options, prompt) for prompt in prompts]
    found, held = {1: Outcome(), 2: Outcome()}, 0
    for request in greedy_requests(prompts, MAX_TOKENS):
        core.submit(request)
    while core.has_work:
        collect(core, found)
        held = max(held, core.kv.pool.held)
    assert tokens_of(found) == tokens
    assert held < sum(-(-(len(prompt) + MAX_TOKENS) // PAGE_SIZE) for prompt in prompts)


def test_summaries_count_as_memory(loaded):
    bare = PagedCache.bytes_per_page(loaded.layers, 16, torch.float32)
    pattern = core_for(loaded, TOPK).runner.attention.pattern
    assert PagedCache.bytes_per_page(loaded.layers, 16, torch.float32, pattern) == bare * 17 / 16
