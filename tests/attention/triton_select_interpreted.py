"""The choice of ``topk`` by the Triton programs against torch's, by Triton's interpreter.

It is chosen when Triton is first imported, so ``test_triton_select`` runs this file in a process of its own.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attention import AttentionBatch, LayerSpec, PagedCache
from attention.formats import CACHE_FORMATS
from attention.kernels import triton_digest, triton_select, triton_select_check
from attention.kernels import triton_select_code as code
from attention.kernels.base import choosing_rows, spans_within
from attention.kernels.reference import Reference
from attention.kernels.triton_paged import Triton
from attention.patterns.topk import TopK
from attention.transfer import device_alone
from tests.attention.cases import Case, layers, make_case

torch.set_num_threads(1)

# A program takes the interpreter some 25 ms: few and small cases, and no search for smaller ones that fail.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
DTYPES = list(CACHE_FORMATS.values())
seeds = st.integers(0, 1 << 30)
patterns = st.builds(
    TopK, st.integers(1, 90), st.integers(0, 3), st.integers(1, 4), st.sampled_from(["dense", "sparse"])
)

# A page so far beyond any cache that to read it ends the process.
NOWHERE = 1 << 30


def widened(case: Case, width: int) -> AttentionBatch:
    """The batch with a page table of so many columns more, which hold nothing of the sequences'."""
    table, counts = case.batch.page_table, [-(-n // case.batch.page_size) for n in case.batch.seq_lens]
    wide = torch.full((len(table), table.shape[1] + width), NOWHERE, dtype=torch.int32)
    for row, own, count in zip(wide, table, counts, strict=True):
        row[:count] = own[:count]
    return dataclasses.replace(case.batch, page_table=wide, plans={})


def seen(covers: torch.Tensor, length: int) -> torch.Tensor:
    """Which positions covers hold, bool ``[N, Hkv, length]``; no position twice, and all in order."""
    result = torch.zeros(*covers.shape[:2], length, dtype=torch.bool)
    room = (covers.shape[2] - 2) // 2
    for cover, inside in zip(covers.flatten(0, 1).long(), result.flatten(0, 1), strict=True):
        tokens = torch.arange(int(cover[0]))
        starts, shifts = cover[2 : 2 + room].contiguous(), cover[2 + room :]
        assert (starts.diff() >= 0).all()
        assert cover[1] == 0
        at = tokens + shifts[torch.searchsorted(starts, tokens, right=True) - 1]
        assert (at.diff() > 0).all()
        inside[at] = True
    return result


def by_torch(case: Case, pattern: TopK) -> torch.Tensor:
    """What ``TopK.select`` chooses, in the layer's own window."""
    rows = choosing_rows(case.batch, pattern)
    spans = pattern.select(case.layer, case.query[rows], rows, case.cache, case.batch)
    begins, ends = spans_within(spans, case.batch.positions[rows], case.layer.window)[..., None].unbind(3)
    at = torch.arange(max(case.batch.seq_lens))
    return ((at >= begins) & (at < ends)).any(dim=2)


def by_programs(case: Case, pattern: TopK, batch: AttentionBatch, processors: int = 8) -> torch.Tensor:
    rows = choosing_rows(case.batch, pattern)
    covers = triton_select.select(pattern, case.layer, case.query, rows, case.cache, batch, processors, 1)
    assert covers.shape[2] <= 2 + 4 * (pattern.choices(batch.page_size) + 2)
    return seen(covers, max(batch.seq_lens))


def check(case: Case, pattern: TopK, **how: int) -> int:
    """How many choices hide something."""
    expected = by_torch(case, pattern)
    assert torch.equal(by_programs(case, pattern, widened(case, 30), **how), expected)
    visible = case.batch.positions[choosing_rows(case.batch, pattern)] + 1
    visible = visible if case.layer.window is None else visible.clamp(max=case.layer.window)
    return int((expected.sum(dim=2) < visible[:, None]).sum())


def ties(case: Case) -> None:
    """Small whole numbers instead: many pages score the same."""
    for tensor in [case.query, case.cache.keys, case.cache.digest]:
        tensor.copy_(tensor.float().clamp(-1, 1).round())


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(
    layers(),
    st.lists(st.tuples(st.integers(3, 90), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(1, 9),
    patterns,
    seeds,
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 8, 100]),
)
def test_it_chooses_what_torch_does(layer, shapes, page_size, pattern, seed, tied, dtype, processors):
    prompts = [length // 2 for length, _ in shapes]
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype, prompt_lens=prompts)
    if tied:
        ties(case)
    if len(choosing_rows(case.batch, pattern)):
        check(case, pattern, processors=processors)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "dtype"),
    [
        (2, 2, 40, None, torch.bfloat16),
        (3, 1, 64, 801, torch.float16),
        (8, 1, 128, None, torch.float8_e4m3fn),
        (17, 1, 8, 401, torch.float32),
    ],
)
def test_rows_of_very_different_lengths(heads, kv_heads, size, window, dtype, tied, monkeypatch):
    """In several parts, with sums and scores looked at in several tiles."""
    monkeypatch.setattr(triton_select, "_PARTS", 2)
    monkeypatch.setattr(triton_select, "_SCORES", 128)
    layer = LayerSpec(0, heads, kv_heads, size, size, size**-0.5, window=window)
    pattern = TopK(130, 1, 4)
    lengths = [(901, 1), (20, 1), (200, 1)]
    case = make_case(layer, lengths, 4, pattern=pattern, dtype=dtype, prompt_lens=[1] * 3)
    if tied:
        ties(case)
    assert check(case, pattern) == 2 * kv_heads


def test_queries_in_another_format_that_lie_apart():
    layer, pattern = LayerSpec(0, 4, 2, 16, 16, 0.25), TopK(24, 1, 1)
    case = make_case(layer, [(200, 1), (90, 1)], 4, pattern=pattern, prompt_lens=[1, 1])
    case.query = case.query.to(torch.bfloat16)
    expected = by_torch(case, pattern)
    case.query = case.query.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(by_programs(case, pattern, case.batch), expected)


def test_many_equal_pages_and_more_choices_than_a_program_has_threads():
    """Few different digests: the threshold is shared by pages, of which the earliest are in."""
    layer, pattern = LayerSpec(0, 2, 1, 8, 8, 0.35), TopK(1200, 2, 3)
    case = make_case(layer, [(1999, 1)], 2, pattern=pattern, prompt_lens=[1])
    digest, pages = case.cache.digest, case.batch.page_table[0, :999].long()
    digest[pages] = digest[pages[torch.randint(5, (999,), generator=torch.Generator().manual_seed(0))]]
    assert check(case, pattern) == 1


@pytest.mark.parametrize("equal", [True, False])
def test_a_page_across_the_windows_edge(equal):
    """It is the first of those to choose from, and in where all are equal, as far as the window reaches."""
    layer, pattern = LayerSpec(0, 2, 1, 8, 8, 0.35, window=102), TopK(40, 1, 1)
    case = make_case(layer, [(150, 1), (151, 1)], 4, pattern=pattern, prompt_lens=[1, 1])
    if equal:
        case.cache.digest[:] = torch.tensor([-1.0, 1.0])[:, None, None]
    assert check(case, pattern) == 2
    assert by_torch(case, pattern)[:, 0, 48:52].sum(dim=1).tolist() == ([4, 3] if equal else [0, 0])


@pytest.mark.parametrize("where", ["page", "query", "infinite"])
def test_what_is_no_number_shows_as_in_torch(where):
    """All scores of its key head are none, and the first pages are chosen; others are as before."""
    layer, pattern = LayerSpec(0, 4, 2, 8, 8, 0.3), TopK(28, 1, 1)
    case = make_case(layer, [(150, 1), (150, 1)], 4, pattern=pattern, prompt_lens=[1, 1])
    before = by_torch(case, pattern)
    if where == "query":
        case.query[0, 1, 3] = math.nan
    else:
        page = int(case.batch.page_table[0, 20])
        case.cache.digest[page, :, 0, 3] = math.nan if where == "page" else torch.tensor([-2.0, math.inf])
    assert check(case, pattern) == 4
    changed = (by_programs(case, pattern, case.batch) != before).any(dim=2)
    assert changed.nonzero().tolist() == [[0, 0]]


def test_shares_too_small_for_double_precision():
    """Bounds thousands apart are still in order, as they are by logarithms."""
    layer, pattern = LayerSpec(0, 4, 2, 8, 8, 40.0), TopK(48, 1, 1)
    case = make_case(layer, [(400, 1)], 4, pattern=pattern, prompt_lens=[1])
    case.query *= 20
    assert check(case, pattern) == 2


def test_a_page_that_is_gone_is_not_read():
    layer, pattern = LayerSpec(0, 4, 2, 8, 8, 0.3), TopK(28, 1, 1)
    case = make_case(layer, [(150, 1)], 4, pattern=pattern, prompt_lens=[1])
    before = by_torch(case, pattern)
    assert case.cache.digest[0].isnan().all()
    kept = next(page for page in range(5, 30) if not before[0, :, 4 * page].any())
    case.batch.page_table[0, kept] = 0
    assert torch.equal(by_programs(case, pattern, case.batch), before)


def test_work_follows_the_pages_of_each_row(monkeypatch):
    """Tiles of digests that are read, with a page table that is wider by far."""
    layer, pattern = LayerSpec(0, 2, 2, 8, 8, 0.35), TopK(24, 1, 1)
    shapes = [(1203, 1), (403, 1), (40, 1), (9, 1)]
    case = make_case(layer, shapes, 4, pattern=pattern, prompt_lens=[1] * 4)
    read = []

    def count(codes, like, widen=code._widened):
        read.append(codes.shape)
        return widen(codes, like)

    monkeypatch.setattr(code, "_widened", count)
    assert torch.equal(by_programs(case, pattern, widened(case, 8000)), by_torch(case, pattern))
    # Smallest and largest numbers, for both key heads. All pages of the last row fit into the budget.
    assert len(read) == 2 * 2 * sum(-(-(length // 4 - 1) // 64) for length in (1203, 403, 40))


def test_a_long_row_among_many_is_cut(monkeypatch):
    """How many parts there are depends on the page table's width, and on nothing that the device knows."""
    grids = []

    class Watched:
        class _Program:
            def __getitem__(self, grid):
                grids.append(grid)
                return lambda **_: None

        bound = score = choose = _Program()

    monkeypatch.setattr(triton_select, "_code", lambda: Watched)
    layer, pattern = LayerSpec(0, 32, 8, 128, 128, 0.1), TopK(512, 1, 4)
    cache = PagedCache([layer], 2, 16, torch.bfloat16, pattern=pattern).layers[0]
    for count, width, parts in ((1, 8192, 66), (64, 8192, 8), (1, 33, 2), (64, 33, 1), (1, 32, None)):
        batch = AttentionBatch.on_device(
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(1, width, dtype=torch.int32),
            16,
        )
        query = torch.empty(count, 32, 128, device="meta")
        triton_select.select(pattern, layer, query, torch.arange(count), cache, batch, 132, 32)
        scored = [] if parts is None else [(8, parts, count)] * 2
        assert grids == [*scored, (8, count)]
        grids.clear()


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(
    layers(),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(1, 40),
    seeds,
    st.sampled_from(DTYPES),
)
def test_digests_are_those_of_torch(layer, shapes, page_size, seed, dtype):
    """To the bit, but for the sign of zero, and none that need not be written."""
    shapes = [(length, min(length, queries)) for length, queries in shapes]
    case = make_case(layer, shapes, page_size, pattern=TopK(64, 1, 1), dtype=dtype, seed=seed)
    expected, pages = case.cache.digest.float(), TopK.completed(case.batch)
    case.cache.digest[pages] = torch.nan
    triton_digest.update(layer, case.cache, case.batch)
    found = case.cache.digest.float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digests_of_every_kind_of_number(dtype):
    """Signs, zeros, subnormal and infinite numbers; what is no number shows in both halves."""
    layer, page_size, pattern = LayerSpec(0, 1, 1, 70, 70, 1.0), 24, TopK(64, 1, 1)
    cache = PagedCache([layer], 3, page_size, dtype, pattern=pattern, poison=True).layers[0]
    batch = AttentionBatch.build([0], [48], [[2, 1]], page_size)
    smallest = torch.finfo(dtype).smallest_normal
    numbers = torch.tensor(
        [0.0, -0.0, 1, -1, smallest / 4, -smallest / 4, 400, -400, math.inf, -math.inf], dtype=dtype
    )
    if dtype == torch.float8_e4m3fn:
        numbers = numbers[:-2]  # it has no infinite ones
    order = torch.randint(len(numbers), (48, 1, 70), generator=torch.Generator().manual_seed(0))
    keys = numbers[order]
    for bad in (None, math.nan, -math.nan):
        if bad is not None:
            keys[3, 0, 5], keys[30, 0, 69] = bad, bad
        cache.write(batch.slots, keys, keys)
        cache.digest.view(torch.uint8).fill_(0x55)
        triton_digest.update(layer, cache, batch)
        expected = torch.stack(keys.float().unflatten(0, (2, page_size)).aminmax(dim=1), dim=1)
        found = cache.digest[[2, 1]].float()
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert found.isnan().sum() == 4


def test_the_kernel_chooses_by_it(monkeypatch):
    layer, pattern = LayerSpec(0, 6, 2, 8, 8, 0.35, window=110), TopK(24, 1, 2)
    shapes, dtype = [(120, 1), (90, 3)], torch.float8_e4m3fn
    case = make_case(layer, shapes, 4, pattern=pattern, dtype=dtype, prompt_lens=[9, 88])
    expected = Reference().forward(layer, case.query, case.cache, case.batch, pattern, None)
    monkeypatch.setattr(TopK, "select", lambda *given: pytest.fail("chosen in torch"))
    monkeypatch.setattr(TopK, "update", lambda *given: pytest.fail("digests made in torch"))
    case.cache.digest[TopK.completed(case.batch)] = torch.nan
    Triton().update(layer, case.cache, case.batch, pattern)
    found = Triton().forward(layer, case.query, case.cache, case.batch, pattern, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_that_the_device_alone_knows():
    """Rows in any order, one of them twice, over a page table that is wider and has more rows."""
    layer, pattern = LayerSpec(0, 6, 2, 8, 8, 0.35), TopK(24, 1, 2)
    assert Triton().needs_host(pattern) is None
    case = make_case(layer, [(130, 1), (64, 1), (7, 1)], 4, pattern=pattern, prompt_lens=[1, 1, 1])
    expected = Reference().forward(layer, case.query, case.cache, case.batch, pattern, None)
    order = torch.tensor([2, 0, 1, 0])
    case.cache.digest[TopK.completed(case.batch)] = torch.nan
    with device_alone():
        table = widened(case, 500).page_table
        batch = AttentionBatch.on_device(order, case.batch.positions[order], table, 4)
        Triton().update(layer, case.cache, batch, pattern)
        found = Triton().forward(layer, case.query[order], case.cache, batch, pattern, None)
    torch.testing.assert_close(found, expected[order], rtol=1e-5, atol=1e-5)


def test_more_bounds_than_are_kept_at_once(monkeypatch):
    monkeypatch.setattr(triton_select, "_MOST_BOUNDS", 1000)
    layer, pattern = LayerSpec(0, 4, 1, 8, 8, 0.35), TopK(24, 1, 2, "sparse")
    case = make_case(layer, [(160, 5), (90, 2)], 4, pattern=pattern)
    assert check(case, pattern) == 7


def test_what_is_derived_from_topk_chooses_by_itself():
    class Derived(TopK):
        pass

    assert triton_select.knows(TopK(64, 1, 1))
    assert not triton_select.knows(Derived(64, 1, 1))


@pytest.mark.parametrize("broken", ["nothing", "select", "update", "error"])
def test_it_is_tried_before_it_serves(broken, monkeypatch):
    monkeypatch.setattr(triton_select_check, "_PAGES", 60)
    pattern = TopK(24, 1, 2)
    layers = [
        LayerSpec(i, 4, 2, 8, 5, 0.35, window=window, sinks=True) for i, window in enumerate((None, 99, 99))
    ]
    select = triton_select.select

    def upside_down(pattern, layer, *given):
        return select(pattern, dataclasses.replace(layer, scale=-layer.scale), *given)

    def stop(*given):
        raise RuntimeError("out of\nresources")

    if broken != "nothing":
        place = (triton_digest, "update") if broken == "update" else (triton_select, "select")
        wrong = {"select": upside_down, "update": lambda *given: None, "error": stop}[broken]
        monkeypatch.setattr(*place, wrong)
    place = torch.device("cpu"), torch.bfloat16, 4, 8, 32
    assert (
        triton_select_check.refusals(pattern, tuple(layers), *place)
        == {
            "nothing": [],
            "select": ["triton chooses other pages for topk on cpu than torch does"],
            "update": ["triton finds other numbers for topk's pages on cpu than torch does"],
            "error": ["triton cannot choose pages for topk on cpu: RuntimeError: out of resources"],
        }[broken]
    )
