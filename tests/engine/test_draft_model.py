"""Another model drafts: no token changes, and its keys keep up with sequences that grow and restart."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.backends import resolve
from attention.cache import PagedCache
from server.checks import refusal
from server.engine.build import build_engine
from server.engine.speculation.other import SHORT, ModelDrafter
from server.errors import RefusedError
from server.messages import Sampling, Submit
from server.models.executors.choose import choose_executor
from server.settings import Settings
from tests.engine.drafting import Paying
from tests.engine.harness import greedy_requests, make_core, run
from tests.engine.harness import load as loaded_from
from tests.engine.journal import DRAWN, PENALIZED, RandomLoad, prompts_of
from tests.engine.remembering import CONTEXT, SMALL, VOCABULARY, remembering
from tests.models.changes import TOKENIZER, edited
from tests.models_zoo import save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, one of its shape but for the layers, and one of another architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": save_tiny("llama", folder / "target"),
        "near": save_tiny("llama", folder / "near", num_hidden_layers=1),
        "other": save_tiny("qwen3", folder / "other"),
    }


@pytest.fixture(scope="module")
def packed(folders):
    return {name: loaded_from(folder, weights="int8") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def floats(folders):
    return {name: loaded_from(folder) for name, folder in folders.items()}


def with_draft(core, draft, *, most=4, budget=512, context=400):
    """The engine with a model that drafts over a cache full of NaN, as if drafting cost nothing."""
    cache = core.runner.cache
    place = (draft.layers, torch.device("cpu"), cache.dtype, cache.page_size)
    own = PagedCache(draft.layers, cache.pages, cache.page_size, cache.dtype, poison=True)
    executor = choose_executor(draft, resolve("full", {}, "auto", *place), own)
    core.drafter = ModelDrafter(executor, most, context, core.runner.rope, budget)
    core.drafter.timing = Paying()
    watch_keys(core)
    return core


def watch_keys(core):
    """Each draft must have read keys that were written, and sampled from numbers."""
    fill, compute = core.drafter.fill, core.drafter.compute

    def filled(drafts):
        for sequence in drafts:
            assert 0 <= sequence.computed - core.drafter.keyed(sequence) <= SHORT
        fill(drafts)

    def computed(*step, rows):
        logits = compute(*step, rows=rows)
        assert logits.isfinite().all()
        return logits

    core.drafter.fill, core.drafter.compute = filled, computed


@settings(max_examples=6, deadline=None)
@given(
    **SMALL,
    most=st.integers(1, 9),
)
def test_random_requests_and_aborts(seed, pages, page_size, max_running, extra_budget, prefix_cache, most):
    """Both models' tokens depend on every token in their pages, so that a draft from wrong keys is wrong."""
    loaded, context = remembering(), min(CONTEXT, (pages - 1) * page_size)
    load = RandomLoad(random.Random(seed), VOCABULARY, context, penalized=seed % 3 == 0)
    expected = run(make_core(loaded, prefix_cache=False, context_length=context), load.requests)
    core = make_core(
        loaded,
        pages=pages,
        page_size=page_size,
        max_running=max_running,
        max_batch_tokens=max_running + extra_budget,
        prefix_cache=prefix_cache,
        context_length=context,
    )
    with_draft(core, loaded, most=most, budget=max_running + extra_budget, context=context)
    accept = core.accepting.accept

    def accepted(sequence, tokens, logprobs):
        assert tokens[:-1] == sequence.drafts, "all are right"
        return accept(sequence, tokens, logprobs)

    core.accepting.accept = accepted
    load.serve(core, expected)


def some_requests():
    kinds = [*DRAWN, PENALIZED]
    return [
        Submit(id=i, prompt=prompt, sampling=sampling, max_tokens=40, logprobs=2)
        for i, (prompt, sampling) in enumerate(zip(prompts_of(3, 61, 17, 33, 90), kinds, strict=True))
    ]


@pytest.mark.parametrize("drafting", ["target", "near", "other"])
@pytest.mark.parametrize("weights", ["int8", "float"])
def test_tokens_and_log_probabilities_are_those_without_drafts(floats, packed, drafting, weights):
    loaded = packed if weights == "int8" else floats
    size = {"max_batch_tokens": 64, "prefix_cache": False, "page_size": 2 if drafting == "near" else 16}
    plain = run(make_core(loaded["target"], **size), some_requests())
    core = with_draft(make_core(loaded["target"], **size), loaded[drafting], budget=64)
    outcomes = run(core, some_requests())
    stats = core.stats()
    assert stats.draft_tokens > (100 if drafting == "target" else 20)
    if weights == "int8":
        assert outcomes == plain, "to the last bit"
    else:
        assert {i: o.tokens for i, o in outcomes.items()} == {i: o.tokens for i, o in plain.items()}
    if drafting == "target":
        assert stats.accepted_draft_tokens >= 0.97 * stats.draft_tokens


def test_keys_are_written_again_after_preemption(packed):
    requests = greedy_requests(prompts_of(40, 37, 45, 31), 60)
    room = {"pages": 18, "page_size": 8, "context_length": 120}
    plain = run(make_core(packed["target"], **room), requests)
    core = with_draft(make_core(packed["target"], **room), packed["target"], context=120)
    outcomes = run(core, requests)
    assert core.scheduler.preemptions > 0
    assert {i: o.tokens for i, o in outcomes.items()} == {i: o.tokens for i, o in plain.items()}
    assert core.stats().accepted_draft_tokens >= 0.97 * core.stats().draft_tokens > 100


def test_pages_of_the_prefix_cache_are_shared_by_both_models(packed):
    """Sequences that begin alike, some of which run on when others begin, and samples of one prompt."""
    begin = prompts_of(64)[0]
    prompts = [begin + more for more in prompts_of(5, 9, 12)] * 2
    requests = [
        Submit(id=i, prompt=prompt, sampling=Sampling(seed=i, temperature=0.7), max_tokens=30 + 5 * i)
        for i, prompt in enumerate(prompts)
    ]
    requests += [
        Submit(id=10 + i, prompt=prompts[0], sampling=Sampling(seed=i), max_tokens=25, leader=leader)
        for i, leader in enumerate([None, 10, 10])
    ]
    plain = run(make_core(packed["target"], max_running=3), requests)
    core = with_draft(make_core(packed["target"], max_running=3), packed["target"])
    outcomes = run(core, requests)
    assert {i: o.tokens for i, o in outcomes.items()} == {i: o.tokens for i, o in plain.items()}
    assert core.kv.prefix_hits > 64
    assert core.stats().accepted_draft_tokens >= 0.97 * core.stats().draft_tokens > 100


def test_a_long_prompt_is_caught_up_with_by_chunks(packed):
    core = with_draft(make_core(packed["target"]), packed["target"], budget=32)
    chunks, compute = [], core.drafter.compute

    def noted(sequences, ids, ends, *, rows):
        if rows == []:
            chunks.append([len(tokens) for tokens in ids])
        return compute(sequences, ids, ends, rows=rows)

    core.drafter.compute = noted
    durations, observe = [], core.scheduler.pace.observe
    core.scheduler.pace.observe = lambda *step: durations.append(step) or observe(*step)
    steps, step = [], core.step
    core.step = lambda: steps.append(1) or step()
    run(core, greedy_requests(prompts_of(150, 100), 30))
    assert max(sum(chunk) for chunk in chunks) == 32
    assert sum(map(sum, chunks)) >= 250
    assert len(durations) == len(steps) - len(chunks), "such a step tells nothing of others"
    assert core.stats().accepted_draft_tokens > 30


def test_nothing_is_drafted_beyond_the_draft_models_context(packed):
    requests = greedy_requests(prompts_of(20, 70), 60)
    plain = run(make_core(packed["target"]), requests)
    core = with_draft(make_core(packed["target"]), packed["target"], context=48)
    ends, compute = [0], core.drafter.compute
    core.drafter.compute = lambda s, ids, last, *, rows: ends.extend(last) or compute(s, ids, last, rows=rows)
    assert run(core, requests)[1].tokens == plain[1].tokens
    assert 40 < max(ends) < 48


GIVEN = {"device": "cpu", "kv_memory": "8MiB", "threads": 1, "speculate": "draft"}


def test_the_settings_make_the_drafter(folders, tmp_path):
    given = {**GIVEN, "weights": "int8", "cache_dir": tmp_path}
    _, alone = build_engine(
        Settings(**{**given, "speculate": "off"}), folders["target"], lambda stage, fraction: None
    )
    stages = []
    core, ready = build_engine(
        Settings(**given, draft_model=str(folders["near"]), draft_tokens=3),
        folders["target"],
        lambda stage, fraction: stages.append(stage),
    )
    assert (ready.speculation.method, ready.speculation.draft_tokens) == ("draft", 3)
    assert ready.speculation.draft_model == str(folders["near"])
    assert any(stage.startswith("the draft model: ") for stage in stages)
    drafter = core.drafter
    assert drafter.executor.name == "native", "its layers are packed"
    assert drafter.executor.cache.pages == core.runner.cache.pages
    # A page of both models: of two layers, and of one.
    assert ready.pages_total < alone.pages_total
    assert ready.kv_bytes <= 8 << 20
    assert ready.weight_bytes > 1.2 * alone.weight_bytes
    drafter.timing = Paying()
    watch_keys(core)
    assert len(run(core, greedy_requests(prompts_of(40), 20))[1].tokens) == 20
    assert core.stats().draft_tokens > 0


def test_floats_are_packed_to_draft_unless_they_are_to_stay(folders, tmp_path):
    for weights, executor in (("auto", "native"), ("float", "layer_by_layer")):
        given = {**GIVEN, "weights": weights, "cache_dir": tmp_path, "draft_model": str(folders["near"])}
        core, ready = build_engine(Settings(**given), folders["target"], lambda stage, fraction: None)
        assert ready.weights == "float32"
        assert core.drafter.executor.name == executor


def test_models_that_do_not_go_together_are_refused(folders, tmp_path):
    def build(target, draft, **changed):
        given = {**GIVEN, "cache_dir": tmp_path, "draft_model": str(draft), **changed}
        build_engine(Settings(**given), target, lambda stage, fraction: None)

    target = folders["target"]
    larger = save_tiny("llama", tmp_path / "larger", vocab_size=384)
    renamed = save_tiny("llama", tmp_path / "renamed")
    file = renamed / "tokenizer.json"
    file.write_text(file.read_text().replace("<|text|>", "<|start|>"))
    broken = save_tiny("llama", tmp_path / "broken")
    # With which the tokenizers library has a bug.
    edited(TOKENIZER, lambda said: said["model"].update(continuing_subword_prefix="#" * 40))(broken)
    windowed = save_tiny("mistral", tmp_path / "windowed")
    for models, changed, sentence in (
        (
            (target, larger),
            {},
            "--draft-model .*larger: it has a vocabulary of 384 tokens, .* one of 320",
        ),
        ((target, renamed), {}, "its tokens mean something else .* longspan distill"),
        (
            (target, broken),
            {},
            "--draft-model .*broken: it .*: the tokenizers library failed: .*out of range",
        ),
        ((target, tmp_path / "none"), {}, "--draft-model .*none: there is no model"),
        ((windowed, target), {}, "every layer of MistralForCausalLM sees a window only"),
        ((target, target), {"attention": "sliding_window"}, "pattern sliding_window does not see all"),
    ):
        with pytest.raises(RefusedError, match=sentence):
            build(*models, **changed)


def test_settings_without_each_other_are_refused():
    assert refusal(Settings(speculate="draft", draft_model="student")) is None
    assert "--draft-model must name the model" in refusal(Settings(speculate="draft"))
    for speculate in ("off", "ngram", "self"):
        sentence = refusal(Settings(speculate=speculate, draft_model="student"))
        assert sentence.startswith("--draft-model: a model drafts with --speculate draft only")
