from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionBatch, LayerSpec, PagedCache, resolve
from attention.kernels.base import spans_within
from attention.kernels.reference import Reference
from attention.patterns.full import Full
from attention.patterns.oracle import Oracle
from attention.patterns.sparse import from_options
from attention.patterns.topk import TopK
from tests.attention.cases import (
    attend,
    budgeted,
    by_definition,
    known,
    layers,
    make_case,
    rows_selected,
    sequences,
    update,
)

topks = budgeted(TopK)
topks_and_oracles = topks | budgeted(Oracle)
page_sizes = st.integers(1, 9)
seeds = st.integers(0, 1 << 30)


def seen_by_hand(pattern, layer, query, i, keys, page_size):
    """The positions that one query at ``i`` sees, a set per KV head, from numbers in plain Python."""
    own = i // page_size
    total = max(math.ceil(pattern.budget / page_size), 3)
    group = layer.query_heads // layer.kv_heads
    result = []
    for kv in range(layer.kv_heads):
        always = {p for p in range(own + 1) if p < pattern.sink_pages or p > own - pattern.recent_pages}
        bounds = {}
        for page in set(range(own + 1)) - always:
            tokens = keys[page * page_size : (page + 1) * page_size, kv].tolist()
            if layer.window is not None and (page + 1) * page_size - 1 <= i - layer.window:
                continue
            columns = [[token[d] for token in tokens] for d in range(layer.head_size)]
            bounds[page] = [
                sum(max(q * min(c), q * max(c)) for q, c in zip(query[head].tolist(), columns, strict=True))
                for head in range(kv * group, (kv + 1) * group)
            ]
        heads = zip(*bounds.values(), strict=True)
        totals = [sum(math.exp(layer.scale * bound) for bound in head) for head in heads]
        scores = {}
        for page, own_bounds in bounds.items():
            shares = (math.exp(layer.scale * u) / total for u, total in zip(own_bounds, totals, strict=True))
            # Pages that share all of two heads' attention both score log(1), but for rounding.
            scores[page] = torch.tensor(round(math.log(sum(shares)), 12), dtype=torch.float64).float().item()
        best = sorted(scores, key=lambda page: (-scores[page], page))
        picked = always | set(best[: max(0, total - pattern.sink_pages - pattern.recent_pages)])
        result.append({j for j in range(i + 1) if j // page_size in picked})
    return result


def ties(case):
    """Small whole numbers instead: many pages score the same."""
    for tensor in [case.query, case.cache.keys, case.cache.summary, *case.keys]:
        tensor.copy_(tensor.clamp(-1, 1).round())


@settings(max_examples=12, deadline=None)
@given(layers(), st.integers(1, 40), page_sizes, topks, seeds, st.booleans())
def test_selection_is_the_rule(layer, length, page_size, pattern, seed, tied):
    case = make_case(layer, [(length, length)], page_size, pattern=pattern, seed=seed)
    if tied:
        ties(case)
    (keys,) = case.keys
    defined = pattern.selection(layer, case.query, case.batch.device.positions, keys, page_size)
    for i in range(length):
        expected = seen_by_hand(pattern, layer, case.query[i], i, keys, page_size)
        assert [set(row.nonzero().flatten().tolist()) for row in defined[i]] == expected


@settings(max_examples=15, deadline=None)
@given(
    layers(),
    sequences(120, 5),
    page_sizes,
    topks,
    seeds,
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 1 << 14, 64 << 20]),
)
def test_select_equals_selection(layer, shapes, page_size, pattern, seed, tied, dtype, block_bytes):
    case = make_case(
        layer,
        shapes,
        page_size,
        pattern=pattern,
        seed=seed,
        dtype=dtype,
        prompt_lens=[length // 2 for length, _ in shapes],
    )
    if tied:
        ties(case)
    assert rows_selected(case, pattern, block_bytes) == len(case.batch.visible.selecting(pattern))


@settings(max_examples=12, deadline=None)
@given(layers(), sequences(120, 5), page_sizes, topks, seeds)
def test_counts_ahead_are_those_of_the_selection(layer, shapes, page_size, pattern, seed):
    lens = [length // 2 for length, _ in shapes]
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed, prompt_lens=lens)
    rows = torch.from_numpy(case.batch.visible.selecting(pattern))
    positions = case.batch.device.positions[rows]
    spans = pattern.select(layer, case.query[rows], known(case.batch, rows), case.cache)
    selected = (spans_within(spans, positions, layer.window).diff(dim=-1).clamp(min=0)).sum(dim=(2, 3))
    pages = pattern.pages_selected(positions, torch.tensor(lens)[case.batch.device.owners[rows]], page_size)
    counted = ((pages - 1) * page_size + positions % page_size + 1)[:, None]
    if layer.window is None:
        assert (selected == counted).all()
    else:
        assert (selected <= counted.clamp(max=layer.window)).all()


@settings(max_examples=12, deadline=None)
@given(layers(features=True), sequences(20, 3), page_sizes, topks_and_oracles, seeds)
def test_reference_follows_the_definition(layer, shapes, page_size, pattern, seed):
    lens = [length // 2 for length, _ in shapes]
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed, prompt_lens=lens)
    result = attend(Reference(), layer, case.query, case.cache, case.batch, pattern, case.sinks)
    torch.testing.assert_close(result.double(), by_definition(case, pattern), rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(layers(), sequences(60, 3), page_sizes, topks_and_oracles, seeds)
def test_a_budget_that_covers_the_context_is_full_attention(layer, shapes, page_size, pattern, seed):
    longest = max(length for length, _ in shapes)
    wide = type(pattern)(longest, pattern.sink_pages, pattern.recent_pages, "sparse")
    case = make_case(layer, shapes, page_size, pattern=wide, seed=seed)
    full = attend(Reference(), layer, case.query, case.cache, case.batch, Full(), None)
    assert torch.equal(attend(Reference(), layer, case.query, case.cache, case.batch, wide, None), full)


@settings(max_examples=20, deadline=None)
@given(sequences(60, 3), page_sizes, topks, seeds)
def test_rows_do_not_depend_on_the_step_that_computes_them(shapes, page_size, pattern, seed):
    """The same sequences with only the last row."""
    layer = LayerSpec(0, 4, 2, 8, 8, 0.3)
    pattern.prefill = "sparse"
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    last = torch.tensor(case.batch.host.query_starts[1:]) - 1
    batched = pattern.select(layer, case.query[last], known(case.batch, last), case.cache)
    pages = case.batch.device.page_table.tolist()
    ends = [length - 1 for length, _ in shapes]
    single = AttentionBatch.build(ends, [1] * len(shapes), pages, page_size)
    rows = known(single, range(len(shapes)))
    assert torch.equal(pattern.select(layer, case.query[last], rows, case.cache), batched)


def test_a_page_that_is_used_again_has_the_summary_of_its_new_keys():
    layer = LayerSpec(0, 2, 2, 8, 8, 0.3)
    pattern = TopK(budget=12, sink_pages=0, recent_pages=1, prefill="sparse")
    cache = PagedCache([layer], 6, 4, torch.float32, pattern=pattern, poison=True).layers[0]
    random = torch.Generator().manual_seed(0)

    def compute(computed, counts, pages):
        batch = AttentionBatch.build(computed, counts, pages, 4)
        keys = torch.randn(sum(counts), 2, 8, generator=random)
        cache.write(batch.device.slots, keys, keys)
        update(pattern, layer, cache, batch)
        return keys, batch

    compute([0], [18], [[1, 2, 3, 4, 5]])
    # Another sequence gets the pages in another order, in three steps of which one leaves a page half full.
    parts = [compute([done], [count], [[5, 3, 1, 2]])[0] for done, count in ((0, 3), (3, 7), (10, 2))]
    first, batch = compute([12], [1], [[5, 3, 1, 2]])
    keys = torch.cat([*parts, first])
    query = torch.randn(1, 2, 8, generator=random)
    spans = pattern.select(layer, query, known(batch, [0]), cache)
    defined = pattern.selection(layer, query, torch.tensor([12]), keys, 4)
    at = torch.arange(13)
    inside = ((at >= spans[..., :1]) & (at < spans[..., 1:])).any(dim=2)
    assert torch.equal(inside, defined)
    assert not inside.all()
    for page, index in ((5, 0), (3, 1), (1, 2)):
        own = keys[4 * index : 4 * index + 4]
        assert torch.equal(cache.summary[page], torch.stack([own.amin(0), own.amax(0)]))


def test_only_complete_pages_are_read_for_summaries():
    """A chunk that ends within a page does not change that page's summary."""
    layer = LayerSpec(0, 2, 1, 4, 4, 0.3)
    pattern = TopK(64, 1, 1)
    case = make_case(layer, [(10, 10), (7, 3)], 4, pattern=pattern)
    summaries = case.cache.summary[case.batch.device.page_table.long()]
    assert summaries[0, :2].isfinite().all()
    assert summaries[1, :1].isfinite().all()
    assert summaries[0, 2].isnan().all()
    assert summaries[1, 1:].isnan().all()


def test_nothing_to_select():
    layer = LayerSpec(0, 2, 1, 4, 4, 0.3)
    pattern = TopK(64, 1, 1)
    case = make_case(layer, [(10, 10)], 4, pattern=pattern)
    rows = torch.from_numpy(case.batch.visible.selecting(pattern))
    assert len(rows) == 0
    spans = pattern.select(layer, case.query[rows], known(case.batch, rows), case.cache)
    assert spans.shape[:2] == (0, 1)


def test_a_prompt_sees_all_unless_prefill_is_sparse():
    positions, prompt_lens = torch.tensor([0, 9, 10, 11]), torch.tensor([10, 10, 10, 10])
    assert TopK(64, 1, 1, "dense").selects(positions, prompt_lens).tolist() == [False, False, True, True]
    assert TopK(64, 1, 1, "sparse").selects(positions, prompt_lens).all()


def test_summaries_take_a_sixteenth_of_pages_of_16():
    specs = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(4)]
    bare = PagedCache.bytes_per_page(specs, 16, torch.bfloat16)
    assert PagedCache.bytes_per_page(specs, 16, torch.bfloat16, TopK(512, 1, 4)) == bare * 17 / 16
    # Dense layers need none.
    half = TopK(512, 1, 4, dense_layers=(0, 1))
    assert PagedCache.bytes_per_page(specs, 16, torch.bfloat16, half) == bare * 33 / 32
    cache = PagedCache(specs, 3, 16, torch.bfloat16, pattern=half)
    assert [cache.layers[i].summary is None for i in range(4)] == [True, True, False, False]


def test_options():
    pattern = from_options({"pattern": "topk"})
    assert pattern.options == {
        "budget": "512",
        "sink_pages": "1",
        "recent_pages": "4",
        "prefill": "dense",
        "dense_layers": "0,1",
    }
    assert pattern.decoded_keys_differ
    assert not from_options({"pattern": "topk", "prefill": "sparse"}).decoded_keys_differ
    specs = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(3)]
    given = {"pattern": "topk", "budget": "100", "prefill": "sparse", "dense_layers": ""}
    attention = resolve("sparse", given, "auto", specs, "cpu", torch.float32, 16)
    assert attention.options == {**given, "sink_pages": "1", "recent_pages": "4"}
    with pytest.raises(ValueError, match="prefill is 'no'; choose dense or sparse"):
        from_options({"pattern": "topk", "prefill": "no"})
    with pytest.raises(ValueError, match="recent_pages is '0'; it must be a whole number of at least 1"):
        from_options({"pattern": "topk", "recent_pages": "0"})
