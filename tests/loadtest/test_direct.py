"""The engine called directly: placed sequences read and hold as many pages as computed ones."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from attention.batch import AttentionBatch
from attention.patterns.written import Written
from loadtest.direct.engine import DirectEngine
from loadtest.direct.room import RoomError, placed_tokens
from loadtest.direct.template import Template
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.models_zoo import save_tiny

PAGE = 4
FULL = {}
WINDOW = {"backend": "sliding_window", "options": {"window": "20", "sinks": "3"}}
VARIANTS = {
    "full": FULL,
    "window": WINDOW,
    **{
        pattern: {"backend": "sparse", "options": {"pattern": pattern, **options}}
        for pattern, options in {
            "longformer": {"window": "20", "global_tokens": "6"},
            "bigbird": {"block": "4", "window_blocks": "2", "random_blocks": "2"},
            "segment": {"segment": "12", "sinks": "2"},
            "lsh": {"window": "9", "buckets": "8", "hashes": "2"},
            "topk": {"budget": "24", "recent_pages": "2", "dense_layers": "0"},
            "oracle": {"budget": "24", "recent_pages": "2", "dense_layers": "0"},
        }.items()
    },
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(save_tiny("llama", tmp_path_factory.mktemp("direct") / "llama", max_position_embeddings=4096))


def core_of(loaded, variant, **sizes):
    sizes = {"pages": 1200, "max_batch_tokens": 32, "prefix_cache": False, **sizes}
    return make_core(loaded, page_size=PAGE, **sizes, **variant)


def engine_of(loaded, variant, **sizes):
    """Over a cache poisoned with NaN, so that a page which placing forgot would show."""
    core = core_of(loaded, variant, **sizes)
    ready = SimpleNamespace(vocabulary_size=loaded.vocabulary_size, kv_bytes=1200 << 10, pages_total=1199)
    return DirectEngine(core, ready)


def prompts_of(loaded, lengths):
    rng = random.Random(0)
    return [[rng.randrange(4, loaded.vocabulary_size) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_placed_context_costs_as_much_as_a_computed_one(loaded, name):
    context, streams = 107, 3
    core = core_of(loaded, VARIANTS[name])
    core.submit(greedy_requests(prompts_of(loaded, [context]), 8)[0])
    before, after = core.stats(), core.step().stats
    while after.decode_tokens == 0:
        before, after = after, core.step().stats

    engine = engine_of(loaded, VARIANTS[name])
    one = engine.decode(context, 1, 2)
    assert (one.pages_read, one.pages_held) == (after.pages_read - before.pages_read, after.pages_used)
    many = engine.decode(context, streams, 2)
    assert (many.pages_read, many.pages_held) == (streams * one.pages_read, streams * one.pages_held)
    assert engine.core.kv.pool.held == 0
    assert not engine.core.has_work


@pytest.mark.parametrize("name", VARIANTS)
def test_a_chunk_costs_the_same_after_a_placed_and_a_computed_context(loaded, name):
    core = core_of(loaded, VARIANTS[name])
    core.submit(greedy_requests(prompts_of(loaded, [96]), 1)[0])
    for _ in range(3):
        before = core.stats()
        stats = core.step().stats
    assert stats.prompt_tokens == 32

    engine = engine_of(loaded, VARIANTS[name])
    engine.decode(1, 1, 1)  # makes what is copied, which counts too
    start = engine.core.stats().pages_read
    assert len(engine.prefill_times(64, 32, repeats=2)) == 2
    read = engine.core.stats().pages_read - start
    assert read == 3 * (core.stats().pages_read - before.pages_read)
    assert engine.core.kv.pool.held == 0


def test_a_window_makes_every_step_cost_the_same(loaded):
    contexts = (107, 219, 507, 2011)  # at the same place in a page each
    engine = engine_of(loaded, WINDOW, pages=40, context_length=4096)
    assert engine.core.kv.pool.total * PAGE < contexts[1], "pages that are not freed must find no room"
    costs = [engine.decode(context, 1, 1) for context in contexts]
    assert len({(cost.pages_read, cost.pages_held) for cost in costs}) == 1
    assert costs[0].pages_held <= -(-20 // PAGE) + 1 + 1  # where the window's edges lie, and the sinks
    engine = engine_of(loaded, FULL)
    costs = [engine.decode(context, 1, 1) for context in contexts]
    assert [cost.pages_held for cost in costs] == [-(-(context + 1) // PAGE) for context in contexts]
    assert all(one.pages_read < other.pages_read for one, other in pairwise(costs))


def test_top_k_reads_no_more_pages_of_a_longer_context_but_in_its_dense_layer(loaded):
    engine = engine_of(loaded, VARIANTS["topk"])
    shorter, longer = (engine.decode(context, 1, 1) for context in (507, 2011))
    layers, pages_more = len(loaded.layers), (2011 - 507) // PAGE
    assert layers > 1
    assert longer.pages_read - shorter.pages_read == pages_more


@pytest.mark.parametrize("name", ["lsh", "topk"])
def test_copied_pages_come_with_their_summaries(loaded, name):
    core = core_of(loaded, VARIANTS[name])
    pattern = core.runner.attention.pattern
    (request,) = greedy_requests(prompts_of(loaded, [64]), 1)
    template = Template(core, request)
    assert core.kv.pool.held == 0
    pages = [900 + number for number in range(40)]
    template.fill(pages, random.Random(0))
    tokens = len(pages) * PAGE
    batch = AttentionBatch.build([0], [tokens], [pages], PAGE)
    summarized = 0
    for index, layer in core.runner.cache.layers.items():
        assert not layer.keys[pages].isnan().any()
        assert not layer.values[pages].isnan().any()
        if layer.summary is None:
            continue
        anew = layer._replace(summary=torch.zeros_like(layer.summary))
        written = Written.known(batch.host, batch.device)
        pattern.update(core.runner.attention.layers[index], anew, written)
        torch.testing.assert_close(layer.summary[pages], anew.summary[pages], rtol=0, atol=0)
        assert len(layer.keys[pages].flatten(1).unique(dim=0)) > 1
        summarized += 1
    assert summarized


def test_a_page_that_was_not_filled_shows(loaded, monkeypatch):
    monkeypatch.setattr(Template, "fill", lambda self, pages, rng: None)
    # The pages that the template had hold its numbers; these go beyond them.
    with pytest.raises(RuntimeError, match="NaN"):
        engine_of(loaded, FULL).decode(2011, 1, 1)


def test_real_runs_give_the_tokens_of_the_engine(loaded):
    prompts = prompts_of(loaded, [5, 40, 71])
    expected = run(core_of(loaded, FULL), greedy_requests(prompts, 6))
    engine = engine_of(loaded, FULL)
    engine.decode(50, 2, 2)
    found = engine.generate(prompts, 6)
    assert found.outputs == [outcome.tokens for outcome in expected.values()]
    assert found.output_tokens == 18
    assert found.seconds > 0


def test_sequences_without_room_are_refused_with_the_setting_that_would_give_it(loaded):
    engine = engine_of(loaded, FULL, pages=100, max_running=4, context_length=300)
    with pytest.raises(RoomError, match="--max-running 4"):
        engine.decode(10, 5, 1)
    with pytest.raises(RoomError, match="more than the context of 300; raise --max-context"):
        engine.decode(300 - placed_tokens(0, 1) + 1, 1, 1)
    with pytest.raises(RoomError, match="but the KV cache has 99; raise --kv-memory to"):
        engine.decode(200, 4, 1)
    assert len(engine.decode(300 - placed_tokens(0, 1), 1, 1).seconds) == 1
    assert len(engine.decode(90, 4, 3).seconds) == 3


def test_the_first_token_may_be_all_there_is(loaded):
    engine = engine_of(loaded, FULL)
    assert engine.decode(1, 2, 1).pages_held == 2
    assert len(engine.prefill_times(0, 3, 1)) == 1


def test_a_prefix_cache_would_take_placed_pages_for_computed_ones(loaded):
    with pytest.raises(ValueError, match="prefix cache off"):
        engine_of(loaded, FULL, prefix_cache=True)
