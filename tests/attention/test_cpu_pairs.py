"""Products of 16-bit integers or bfloat16 in the C++ kernel: near the oracle's, the same in any company."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec, resolve
from attention.kernels.cpu import levels
from attention.kernels.cpu.calls import compiled
from attention.kernels.cpu.paged import CpuPaged
from attention.kernels.reference import Reference
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import Case, attend, layers, make_case, patterns, sequences
from tests.instructions import at, every_level

NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
CPU = torch.device("cpu")
PLAIN = LayerSpec(0, 6, 2, 8, 8, 0.35)
EXACT, ROUNDING = CpuPaged(), CpuPaged(rounds_products=True)
# Half a unit in each of 16 bits.
ROUNDED = 0.5 / 32767
# Half a unit in the last of bfloat16's 8 digits.
ROUNDED_BFLOAT16 = 2.0**-9

page_sizes = st.integers(1, 32)
seeds = st.integers(0, 1 << 30)


def compute(kernel: CpuPaged | Reference, case: Case, pattern: Pattern, rerotated=None) -> torch.Tensor:
    return attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks, rerotated)


def wide(case: Case) -> Case:
    """Queries and results in float32, so that only the kernel rounds."""
    case.query = case.query.float()
    case.sinks = None if case.sinks is None else case.sinks.float()
    return case


def bound(case: Case, rerotated: torch.Tensor | None = None) -> float:
    """The most that rounding can do.

    Each number of a query and a key is off by half a unit of 1/32767 of its length, so that a logit is off by
    at most the square root of their count times that, twice, times both lengths. Weights and their sum are
    off by the logits' error, to first order, a weight in its tile of 64 tokens by half a unit of the tile's
    sum, a value by half a unit of the largest. In bfloat16 each number is off by a share of itself.
    """
    layer = case.layer
    queries = case.query if rerotated is None else torch.cat([case.query, rerotated])
    length = float(queries.norm(dim=-1).max()) * max(
        float(keys.float().norm(dim=-1).max()) for keys in case.keys
    )
    values = max(float(values.float().abs().max()) for values in case.values)
    if levels.has_matrix_unit():
        logits = 2 * ROUNDED_BFLOAT16 * length * layer.scale
        return values * (2 * math.expm1(logits) + 2 * ROUNDED_BFLOAT16) + 1e-5
    logits = 2 * ROUNDED * math.sqrt(layer.head_size) * length * layer.scale
    return values * (2 * math.expm1(logits) + 65 * ROUNDED) + 1e-5


def check(case: Case, pattern: Pattern, rerotated: torch.Tensor | None = None) -> None:
    result = compute(ROUNDING, case, pattern, rerotated)
    assert result.dtype == torch.float32
    expected = compute(Reference(), case, pattern, rerotated)
    torch.testing.assert_close(result, expected, rtol=0, atol=bound(case, rerotated))


@pytest.fixture(scope="module", autouse=True)
def has_pairs():
    """The tests below would else compare float32 with itself."""
    if not compiled().has_pairs:
        pytest.skip("this processor has no faster products of 16-bit integers")


@settings(max_examples=20, deadline=None)
@given(layers(features=True), sequences(300, 5), page_sizes, patterns, seeds, st.sampled_from(NARROW))
def test_close_to_reference(layer, shapes, page_size, pattern, seed, dtype):
    check(wide(make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)), pattern)


@settings(max_examples=15, deadline=None)
@given(
    layers(features=True),
    sequences(200, 4),
    page_sizes,
    seeds,
    st.integers(1, 40),
    st.integers(0, 9),
    st.data(),
)
def test_queries_rerotated_toward_the_first_keys(layer, shapes, page_size, seed, window, sinks, data):
    pattern = SlidingWindow(window, sinks)
    pattern.rerotated = data.draw(st.integers(1, sinks + 2), label="rerotated")
    dtype = data.draw(st.sampled_from(NARROW), label="dtype")
    case = wide(make_case(layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype))
    check(case, pattern, torch.randn(case.query.shape, generator=torch.Generator().manual_seed(seed + 1)))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "value_size"),
    [(9, 3, 64, 64), (5, 1, 80, 72), (14, 2, 128, 128), (1, 1, 33, 257), (130, 1, 4, 4)],
)
def test_long_prompts(dtype, heads, kv_heads, size, value_size):
    """Many parts and blocks, heads that do and don't fill vectors, groups of any size."""
    layer = LayerSpec(0, heads, kv_heads, size, value_size, size**-0.5)
    case = wide(make_case(layer, [(4200, 9), (700, 1), (300, 300)], 16, dtype=dtype))
    check(case, Full())
    check(case, SlidingWindow(window=70, sinks=3))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_it_rounds_only_what_it_may(dtype):
    """Rows of a prompt differ in their last bits, rows after it and a cache in float32 do not."""
    layer = LayerSpec(0, 9, 3, 64, 64, 0.125)
    case = wide(make_case(layer, [(300, 60), (200, 1)], 16, dtype=dtype, prompt_lens=[300, 1]))
    rounded, exact = compute(ROUNDING, case, Full()), compute(EXACT, case, Full())
    assert not (rounded[:60] == exact[:60]).flatten(1).all(dim=1).any()
    assert torch.equal(rounded[60:], exact[60:])
    case = make_case(layer, [(300, 60)], 16)
    assert torch.equal(compute(ROUNDING, case, Full()), compute(EXACT, case, Full()))


@settings(max_examples=15, deadline=None)
@given(layers(features=True), sequences(600, 5), page_sizes, patterns, seeds, st.sampled_from(NARROW))
def test_neighbors_and_threads_change_no_bit(layer, shapes, page_size, pattern, seed, dtype):
    case = wide(make_case(layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        batched = compute(ROUNDING, case, pattern)
        torch.set_num_threads(1)
        for b in range(len(shapes)):
            rows = batched[case.batch.host.query_starts[b] : case.batch.host.query_starts[b + 1]]
            assert torch.equal(rows, compute(ROUNDING, case.only(b), pattern))
    finally:
        torch.set_num_threads(threads)


def test_many_small_weights_beside_a_large_one_are_kept():
    """They are rounded as shares of their own tile, not of the largest weight: all would be 0."""
    length, layer = 6000, LayerSpec(0, 1, 1, 1, 1, 1.0)
    case = wide(make_case(layer, [(length, 8)], 16, dtype=torch.float16))
    small = -math.log(8 * length)  # each an eighth of 1 / 6000 of the first token's weight
    keys = torch.full((length, 1, 1), small)
    keys[0] = 0
    values = torch.ones(length, 1, 1)
    values[0] = 0
    pages = case.batch.device.page_table[0].long()
    slots = (pages[:, None] * 16 + torch.arange(16)).flatten()[:length]
    case.cache.write(slots, keys, values)
    case.query[:] = 1
    result = compute(ROUNDING, case, Full())
    expected = compute(Reference(), case, Full())
    assert float(expected.min()) > 0.11
    # The logit is rounded to bfloat16, and a weight is off by as much as it.
    tolerance = -small * ROUNDED_BFLOAT16 if levels.has_matrix_unit() else 1e-3
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=0)


def test_channels_of_very_different_size():
    """One channel holds nearly all of a key's length, as in some models; the others still count."""
    layer = LayerSpec(0, 4, 2, 64, 64, 0.125)
    case = wide(make_case(layer, [(400, 400)], 16, dtype=torch.float16))
    case.cache.keys[1:, :, :, 5] += 100
    case.query[:, :, 5] *= 0.01
    error = (compute(ROUNDING, case, Full()) - compute(Reference(), case, Full())).abs().max()
    # Both lengths make 800, a logit is off by an eighth of 1.3e-5 of that, and a value is up to 4; times 4
    # for the largest of many. In bfloat16 the channel's own product, some 1, and the others', some 8, are off
    # by a share of themselves.
    assert float(error) < 4 * (9 / 8 * 2 * ROUNDED_BFLOAT16 if levels.has_matrix_unit() else 1.3e-3) * 4


@pytest.mark.parametrize("spoiled", ["keys", "values", "query"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_show(spoiled, number):
    for rows in 1, 30:
        case = wide(make_case(PLAIN, [(40, rows)], 8, dtype=torch.float16))
        if spoiled == "query":
            case.query[:, :, 3] = number
        else:
            getattr(case.cache, spoiled)[case.batch.device.page_table[0, 0], 5, :, 3] = number
        assert not compute(ROUNDING, case, Full()).isfinite().all(dim=2).any()


def test_zeros():
    """No length, no largest value."""
    case = wide(make_case(PLAIN, [(40, 30)], 8, dtype=torch.float16))
    case.cache.keys[1:] = 0
    check(case, Full())
    case.query[:] = 0
    case.cache.values[1:] = 0
    assert not compute(ROUNDING, case, Full()).any()


@every_level
def test_at_every_level(level):
    grouped = LayerSpec(0, 9, 3, 64, 64, 0.125)
    odd = LayerSpec(0, 5, 1, 20, 12, 0.2, window=50, softcap=8.0, sinks=True)
    with at(level):
        for dtype in NARROW:
            for layer in (grouped, odd):
                for pattern in (Full(), SlidingWindow(window=33, sinks=5)):
                    check(
                        wide(make_case(layer, [(190, 100), (70, 9)], 16, pattern=pattern, dtype=dtype)),
                        pattern,
                    )
            case = wide(make_case(grouped, [(4200, 70)], 16, dtype=dtype))
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(compute(ROUNDING, case, Full()))
            assert torch.equal(*results)


def test_it_is_chosen_and_told():
    def chosen(dtype: torch.dtype, round_products: bool):
        return resolve("full", {}, "auto", [PLAIN], CPU, dtype, 16, round_products=round_products)

    for dtype in NARROW:
        numbers = "bfloat16" if levels.has_matrix_unit() else "16-bit integers"
        assert chosen(dtype, True).reason.endswith(f"; prompts in products of {numbers}")
    for attention in (chosen(torch.float32, True), chosen(torch.float16, False)):
        assert "products" not in attention.reason
