"""The selection of ``topk`` in C++ against its definition from the keys themselves, and against torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionBatch, LayerSpec, PagedCache, resolve
from attention.dtypes import CACHE_DTYPES
from attention.kernels.cpu import native, select
from attention.kernels.cpu.chain import Chain
from attention.kernels.cpu.chained import ChainedAttention
from attention.kernels.cpu.paged import CpuPaged
from attention.patterns.full import Full
from attention.patterns.topk import TopK
from tests.attention.cases import Case, attend, known, layers, make_case, selection, sequences, update
from tests.cover import every_pair
from tests.instructions import at, every_level

DTYPES = list(CACHE_DTYPES.values())


class Native(TopK):
    """``TopK`` with summaries and selections in C++; its definition, ``selection``, is torch's."""

    def update(self, layer, cache, written):
        select.update(layer, cache, written)

    def select(self, layer, query, rows, cache):
        batch = rows.batch
        whole = query.new_full((len(batch.positions), *query.shape[1:]), float("nan")).float()
        whole[rows.rows] = query.float()
        width = min(self.most_selected(batch.page_size), batch.page_table.shape[1])
        ranges = torch.full((len(rows), layer.kv_heads, width + 2, 2), -1)
        kept = select.Rows(rows.rows, batch.owners[rows.rows], rows.positions, ranges)
        return select.select(self, layer, whole, kept, cache, batch.page_table, batch.page_size)


patterns = st.builds(
    Native, st.integers(1, 90), st.integers(0, 3), st.integers(1, 4), st.sampled_from(["dense", "sparse"])
)
page_sizes = st.integers(1, 9)
seeds = st.integers(0, 1 << 30)
dtypes = st.sampled_from(DTYPES)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ties(case: Case) -> None:
    """Small whole numbers instead: many pages score the same."""
    for tensor in [case.query, case.cache.keys, case.cache.summary, *case.keys]:
        tensor.copy_(tensor.float().clamp(-1, 1).round())


def check(case: Case, pattern: TopK) -> int:
    """How many rows select."""
    rows = 0
    for selected, defined in selection(case, pattern):
        assert torch.equal(selected, defined)
        rows += len(selected)
    return rows


@settings(max_examples=15, deadline=None)
@given(layers(), sequences(120, 5), page_sizes, patterns, seeds, st.booleans(), dtypes, st.integers(1, 2))
def test_select_equals_selection(layer, shapes, page_size, pattern, seed, tied, dtype, threads):
    torch.set_num_threads(threads)
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
    assert check(case, pattern) == len(case.batch.visible.selecting(pattern))


@every_pair(
    sizes=[(9, 3, 64, None), (5, 1, 80, None), (14, 2, 128, 3000), (4, 4, 33, None), (34, 1, 4, 500)],
    dtype=DTYPES,
    tied={"apart": False, "tied": True},
)
def test_many_pages(sizes, dtype, tied):
    """Pages in many parts, heads that do and don't fill vectors, groups of any size."""
    heads, kv_heads, size, window = sizes
    layer = LayerSpec(0, heads, kv_heads, size, size, size**-0.5, window=window)
    pattern = Native(130, 1, 4)
    case = make_case(
        layer,
        [(2500, 1), (20, 1), (1801, 3)],
        4,
        pattern=pattern,
        dtype=dtype,
        prompt_lens=[1, 1, 1],
    )
    if tied:
        ties(case)
    for threads in 1, 2:
        torch.set_num_threads(threads)
        assert check(case, pattern) == 5


@every_level
def test_at_every_level(level):
    with at(level):
        for dtype in DTYPES:
            for tied in (False, True):
                test_many_pages((9, 3, 64, None), dtype, tied)
                test_many_pages((4, 4, 33, 500), dtype, tied)
            test_summaries_of_every_kind_of_number(dtype)


@settings(max_examples=15, deadline=None)
@given(layers(), sequences(200, 5), page_sizes, patterns, seeds, dtypes)
def test_neighbors_and_threads_change_nothing(layer, shapes, page_size, pattern, seed, dtype):
    pattern.prefill = "sparse"
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype)
    rows = torch.arange(len(case.query))
    torch.set_num_threads(2)
    batched = pattern.select(layer, case.query, known(case.batch, rows), case.cache)
    torch.set_num_threads(1)
    for b in range(len(shapes)):
        own = case.only(b)
        found = pattern.select(layer, own.query, known(own.batch, rows[: len(own.query)]), own.cache)
        start, stop = case.batch.host.query_starts[b : b + 2]
        assert torch.equal(batched[start:stop], found)


@settings(max_examples=15, deadline=None)
@given(layers(), sequences(100, 5), page_sizes, seeds, dtypes, st.integers(1, 2))
def test_summaries_are_those_of_torch(layer, shapes, page_size, seed, dtype, threads):
    """To the bit, and it writes no others."""
    torch.set_num_threads(threads)
    made = [
        make_case(layer, shapes, page_size, pattern=kind(64, 1, 1), seed=seed, dtype=dtype).cache.summary
        for kind in (Native, TopK)
    ]
    assert torch.equal(made[0].isnan(), made[1].isnan())
    assert torch.equal(*(summary.float().nan_to_num() for summary in made))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries_of_every_kind_of_number(dtype):
    """Signs, zeros, subnormal and infinite numbers; NaN shows in every result."""
    layer, page_size = LayerSpec(0, 1, 1, 70, 70, 1.0), 8
    cache = PagedCache([layer], 3, page_size, dtype, pattern=Native(64, 1, 1), poison=True).layers[0]
    batch = AttentionBatch.build([0], [16], [[2, 1]], page_size)
    smallest = torch.finfo(dtype).smallest_normal
    numbers = torch.tensor(
        [0.0, -0.0, 1, -1, smallest / 4, -smallest / 4, 400, -400, float("inf"), -float("inf")], dtype=dtype
    )
    if dtype == torch.float8_e4m3fn:
        numbers = numbers[:-2]  # it has no infinite ones
    order = torch.randint(len(numbers), (16, 1, 70), generator=torch.Generator().manual_seed(0))
    keys = numbers[order]
    cache.write(batch.device.slots, keys, keys)
    update(TopK(64, 1, 1), layer, cache, batch)
    expected = torch.stack(keys.float().unflatten(0, (2, page_size)).aminmax(dim=1), dim=1)
    assert torch.equal(cache.summary[[2, 1]].float(), expected)

    for bad in (float("nan"), -float("nan")):
        spoiled = keys.clone()
        spoiled[3, 0, 5] = bad
        cache.write(batch.device.slots, spoiled, spoiled)
        update(TopK(64, 1, 1), layer, cache, batch)
        shown = cache.summary[[2, 1]].isnan().any(dim=1)
        assert shown.nonzero().tolist() == [[0, 0, 5]]


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_pages_whose_keys_are_nan_do_not_affect_other_sequences(signs):
    """All scores of their own row are NaN: the first pages are selected, as by the definition."""
    layer, pattern = LayerSpec(0, 4, 2, 8, 8, 0.3), Native(28, 1, 1)
    case = make_case(layer, [(150, 1), (150, 1)], 4, pattern=pattern, prompt_lens=[1, 1])
    for sign, index in zip(signs, (20, 27), strict=True):
        page = int(case.batch.device.page_table[0, index])
        case.cache.summary[page, :, 0, 3] = case.keys[0][4 * index + 3, 0, 3] = math.copysign(math.nan, sign)
    assert check(case, pattern) == 2


def test_rows_of_many_heads_and_pages():
    """More than are scored at once."""
    layer, pattern = LayerSpec(0, 32, 1, 4, 4, 0.5), Native(20, 1, 1, "sparse")
    case = make_case(layer, [(700, 700)], 2, pattern=pattern)
    torch.set_num_threads(2)
    rows = torch.arange(700)
    found = pattern.select(layer, case.query, known(case.batch, rows), case.cache)
    at = torch.arange(700)
    expected = TopK.select(pattern, layer, case.query, known(case.batch, rows), case.cache)
    for one, other in zip(found, expected, strict=True):
        inside = [((at >= ranges[..., :1]) & (at < ranges[..., 1:])).any(dim=1) for ranges in (one, other)]
        assert torch.equal(*inside)


def test_shares_too_small_for_double_precision():
    """Bounds thousands apart are still in order, as they are by logarithms."""
    layer, pattern = LayerSpec(0, 4, 2, 8, 8, 40.0), Native(48, 1, 1)
    case = make_case(layer, [(900, 1), (901, 2)], 4, pattern=pattern, prompt_lens=[1, 1])
    case.query *= 20
    torch.set_num_threads(2)
    assert check(case, pattern) == 3
    ranges = pattern.select(layer, case.query, known(case.batch, range(3)), case.cache)
    assert not torch.equal(ranges[0, 0], ranges[0, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_selects_in_cpp(dtype, monkeypatch):
    """And its output is the same as with the selection in torch."""
    layer, pattern = LayerSpec(0, 6, 2, 8, 8, 0.35, window=150), TopK(24, 1, 2)
    case = make_case(
        layer, [(300, 1), (200, 9), (7, 7)], 4, pattern=pattern, dtype=dtype, prompt_lens=[9, 195, 7]
    )
    spread = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    monkeypatch.setattr(TopK, "select", lambda *given: pytest.fail("selected in torch"))
    made = attend(CpuPaged(), layer, spread, case.cache, case.batch, pattern, None)
    monkeypatch.undo()
    monkeypatch.setattr(select, "knows", lambda pattern: False)
    assert torch.equal(made, attend(CpuPaged(), layer, case.query, case.cache, case.batch, pattern, None))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), min_size=1, max_size=4),
    st.lists(st.sampled_from([None, None, 7, 40]), min_size=1, max_size=4),
    st.builds(
        TopK, st.integers(1, 30), st.integers(0, 2), st.integers(1, 2), st.sampled_from(["dense", "sparse"])
    ),
    st.integers(1, 6),
    dtypes,
    seeds,
    st.data(),
)
def test_chained_attention_selects_as_layers_do(lengths, windows, pattern, page_size, dtype, seed, data):
    """Steps of one chain, of prompts' rows and others, with a dense layer; to the last bit."""
    specs = [LayerSpec(i, 6, 2, 24, 24, 0.2, window=window) for i, window in enumerate(windows)]
    pattern.dense_layers = data.draw(st.sampled_from([(), (0,)]), label="dense layers")
    counts = [-(-sum(length) // page_size) for length in lengths]
    ends = [sum(counts[: b + 1]) for b in range(len(counts))]
    pages = [list(range(end, end - count, -1)) for end, count in zip(ends, counts, strict=True)]
    prompts = [data.draw(st.integers(1, sum(length)), label="prompt") for length in lengths]
    caches = [
        PagedCache(specs, sum(counts) + 1, page_size, dtype, pattern=pattern, poison=True) for _ in range(2)
    ]
    random = torch.Generator().manual_seed(seed)
    layered = [(layer, Full() if layer.index in pattern.dense_layers else pattern) for layer in specs]
    chained = ChainedAttention(CpuPaged(), layered, caches[0])
    for computed, part in (([0] * len(lengths), 0), ([there for there, _ in lengths], 1)):
        step = [length[part] for length in lengths]
        some = [b for b, tokens in enumerate(step) if tokens]
        if not some:
            continue
        batch = AttentionBatch.build(
            *([of[b] for b in some] for of in (computed, step, pages)),
            page_size,
            prompt_lens=[prompts[b] for b in some],
        )
        for layer, own in layered:
            heads = torch.randn(len(batch.device.slots), 10, 24, generator=random)
            query, key, value = heads.split([6, 2, 2], dim=1)
            output = torch.full((len(batch.device.slots), 6, 24), float("nan"))
            chained.prepare(batch, chained.given(batch), query, key, value, output)
            Chain(chained.calls[layer.index]).run()
            cache = caches[1].layers[layer.index]
            cache.write(batch.device.slots, key, value)
            if own is pattern:
                update(pattern, layer, cache, batch)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(select, "knows", lambda pattern: False)
                expected = attend(CpuPaged(), layer, query, cache, batch, own, None)
            assert torch.equal(output, expected)


def test_a_class_derived_from_topk_selects_in_torch():
    assert select.knows(TopK(64, 1, 1))
    assert not select.knows(Native(64, 1, 1))


def test_the_kernel_says_so_if_the_selection_cannot_be_compiled(monkeypatch):
    def refuse():
        raise native.NativeError("the compiler is broken")

    monkeypatch.setattr(select, "compiled", refuse)
    layer = LayerSpec(0, 6, 2, 8, 8, 0.35)

    def resolved(backend, options):
        return resolve(backend, options, "auto", [layer], "cpu", torch.float32, 16)

    attention = resolved("sparse", {"pattern": "topk", "dense_layers": ""})
    assert attention.kernel.name != "cpu_paged"
    assert "cpu_paged cannot be compiled here: the compiler is broken" in attention.reason
    assert resolved("full", {}).kernel.name == "cpu_paged"
