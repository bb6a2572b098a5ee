"""The Triton programs against the oracle, by Triton's interpreter.

Triton decides for it at its first import, so ``test_triton`` runs this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attention import LayerSpec
from attention.kernels import triton_paged
from attention.kernels.base import Kernel
from attention.kernels.reference import Reference
from attention.kernels.triton_paged import Triton
from attention.kernels.triton_plan import Tile
from attention.patterns.base import Pattern
from attention.patterns.bigbird import BigBird
from attention.patterns.full import Full
from attention.patterns.oracle import Oracle
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import Case, attend, content_patterns, layers, make_case, patterns, sequences
from tests.interpreter import replace_language_once

torch.set_num_threads(1)
replace_language_once()

# A program takes the interpreter some 25 ms, so there are few programs: small batches, few examples, and no
# search for smaller ones that fail too.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
page_sizes = st.integers(1, 20) | st.sampled_from([32, 64])
seeds = st.integers(0, 1 << 30)
ROOMY = Tile(64, 32, 4, 1, 1000, 1)


@st.composite
def tile_pairs(draw: st.DrawFn) -> tuple[Tile, Tile]:
    """For single rows and for chunks; small enough that small cases take several tiles and parts."""

    def tile(pairs: int) -> Tile:
        part, programs = draw(st.sampled_from([(16, 2), (1000, 1)]))
        return Tile(pairs, draw(st.sampled_from([16, 32])), 4, 1, part, programs)

    return tile(16), tile(draw(st.sampled_from([32, 64])))


def few_queries(longest: int, most: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    one = st.integers(1, longest).flatmap(
        lambda length: st.tuples(st.just(length), st.integers(1, min(3, length)))
    )
    return st.lists(one, min_size=1, max_size=most)


def compute(
    kernel: Kernel, case: Case, pattern: Pattern, rerotated: torch.Tensor | None = None
) -> torch.Tensor:
    return attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks, rerotated)


def interpreted(
    case: Case,
    pattern: Pattern,
    rerotated: torch.Tensor | None = None,
    tiles: tuple[Tile, Tile] = (ROOMY, ROOMY),
) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_paged, "tiles", lambda *_: tiles)
        return compute(Triton(), case, pattern, rerotated)


def assert_equal(case: Case, pattern: Pattern, rerotated: torch.Tensor | None = None, **how) -> None:
    expected = compute(Reference(), case, pattern, rerotated)
    torch.testing.assert_close(interpreted(case, pattern, rerotated, **how), expected, rtol=1e-5, atol=1e-5)


def test_it_is_the_interpreter():
    code = triton_paged._code()
    assert code.INTERPRETED
    assert type(code.attend).__name__ == "InterpretedFunction"
    place = [LayerSpec(0, 2, 1, 4, 4, 0.5)], torch.device("cpu"), torch.float32, 16
    assert Triton().unsupported(*place, Full()) == []


@settings(max_examples=10, deadline=None, phases=PHASES)
@given(layers(features=True), sequences(60, 2), page_sizes, patterns, seeds, tile_pairs())
def test_any_batch_under_any_rule(layer, shapes, page_size, pattern, seed, tiles):
    assert_equal(make_case(layer, shapes, page_size, pattern=pattern, seed=seed), pattern, tiles=tiles)


@settings(max_examples=6, deadline=None, phases=PHASES)
@given(
    layers(), sequences(60, 2), page_sizes, patterns, seeds, st.sampled_from([torch.bfloat16, torch.float16])
)
def test_half_precision_errs_by_that_precision(layer, shapes, page_size, pattern, seed, dtype):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    result = interpreted(case, pattern)
    assert result.dtype == dtype
    # Weights are rounded, and the result; values reach about 4.
    error = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, compute(Reference(), case, pattern), rtol=error, atol=error)


@settings(max_examples=6, deadline=None, phases=PHASES)
@given(layers(features=True), sequences(60, 2), page_sizes, patterns, seeds, tile_pairs())
def test_keys_and_values_of_8_bits_are_as_exact_as_queries(layer, shapes, page_size, pattern, seed, tiles):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=torch.float8_e4m3fn, seed=seed)
    assert case.query.dtype == torch.float32
    assert_equal(case, pattern, tiles=tiles)


def test_every_number_of_8_bits():
    """One value each; NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    case = make_case(LayerSpec(0, 1, 1, 1, 256, 1.0), [(1, 1)], 4, dtype=torch.float8_e4m3fn)
    case.cache.write(case.batch.device.slots, torch.zeros(1, 1, 1), codes.view(1, 1, 256))
    for query_dtype in (torch.float32, torch.float16, torch.bfloat16):
        case.query = case.query.to(query_dtype)
        result = interpreted(case, Full()).flatten()
        expected = codes.to(query_dtype)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=6, deadline=None, phases=PHASES)
@given(
    layers(features=True), few_queries(60, 2), page_sizes, content_patterns(), seeds, tile_pairs(), st.data()
)
def test_rows_that_select_by_content(layer, shapes, page_size, pattern, seed, tiles, data):
    prompts = [data.draw(st.integers(1, length + 1), label="prompt") for length, _ in shapes]
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed, prompt_lens=prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_paged, "_SELECTING_ROWS", data.draw(st.sampled_from([2, 64]), label="at once"))
        patch.setattr(triton_paged, "_SELECTED_RANGES", data.draw(st.sampled_from([1, 4]), label="ranges"))
        assert_equal(case, pattern, tiles=tiles)


def test_the_keys_themselves_are_read_from_a_cache_of_8_bits():
    """By the oracle, whose selection is by the numbers that the codes stand for."""
    pattern = Oracle(12, 1, 1)
    layer, shapes = LayerSpec(0, 4, 2, 16, 16, 0.25), [(50, 1), (41, 1)]
    case = make_case(
        layer, shapes, 4, pattern=pattern, dtype=torch.float8_e4m3fn, prompt_lens=[20, 20], seed=3
    )
    assert_equal(case, pattern)


@settings(max_examples=6, deadline=None, phases=PHASES)
@given(
    layers(features=True), sequences(60, 2), page_sizes, seeds, st.integers(1, 30), tile_pairs(), st.data()
)
def test_queries_rerotated_toward_the_first_keys(layer, shapes, page_size, seed, window, tiles, data):
    sinks = data.draw(st.integers(0, 20), label="sinks")
    pattern = SlidingWindow(window, sinks)
    pattern.rerotated = data.draw(st.integers(1, sinks + 2), label="rerotated")
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    assert_equal(case, pattern, case.query.flip(0), tiles=tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tiles_that_a_gpu_gets(dtype):
    layer = LayerSpec(0, 6, 2, 20, 12, 0.3, window=100, softcap=3.0, sinks=True)
    case = make_case(layer, [(330, 1), (150, 70), (40, 1)], 16, dtype=dtype)
    error = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    expected = compute(Reference(), case, Full())
    torch.testing.assert_close(compute(Triton(), case, Full()), expected, rtol=error, atol=error)


@pytest.fixture
def launched(monkeypatch):
    """The grid and the constants of every launch of ``attend``, which is launched all the same."""
    found = []
    code = triton_paged._code()

    class Watched:
        INTERPRETED = code.INTERPRETED

        class attend:  # noqa: N801
            def __class_getitem__(cls, grid):
                def launch(**arguments):
                    constants = {name: value for name, value in arguments.items() if name.isupper()}
                    found.append((grid, tuple(sorted(constants.items()))))
                    code.attend[grid](**arguments)

                return launch

        combine = code.combine

    monkeypatch.setattr(triton_paged, "_code", lambda: Watched)
    return found


def test_long_keys_are_split_among_programs(launched):
    case = make_case(LayerSpec(0, 3, 1, 16, 16, 0.25), [(700, 1), (5, 1), (300, 4)], 64)
    tile = Tile(16, 32, 4, 1, 100, 64)
    assert_equal(case, Full(), tiles=(tile, tile))
    # 700 tokens in 7 parts beside the 5 tokens' one; 300 tokens in 3.
    assert [grid for grid, _ in launched] == [(8, 1), (3, 1)]


class EverySecond(Full):
    """A query sees itself and every second token before: ``count`` ranges; the next row sees none of them."""

    name = "every second"
    dense = False

    def __init__(self, count: int) -> None:
        self.count = count

    def visible(self, query_positions, key_positions):
        back = query_positions - key_positions
        return (back >= 0) & (back < 2 * self.count) & (back % 2 == 0)

    def spans(self, positions):
        begins = positions[:, None] - 2 * torch.arange(self.count - 1, -1, -1)
        return torch.stack([begins, begins + 1], dim=-1).clamp(min=0)


def test_numbers_of_ranges_up_to_a_power_of_two_share_a_program(launched):
    for pattern in map(EverySecond, range(1, 9)):
        assert_equal(make_case(LayerSpec(0, 2, 1, 8, 8, 0.35), [(60, 20)], 8, pattern=pattern), pattern)
    assert [dict(constants)["ROW_RANGES"] for _, constants in launched] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert len({constants for _, constants in launched}) == 4


def test_a_group_larger_than_a_tile():
    case = make_case(LayerSpec(0, 40, 2, 8, 8, 0.35, sinks=True), [(50, 1), (30, 3)], 8)
    tile = Tile(16, 32, 4, 1, 1000, 1)
    assert_equal(case, Full(), tiles=(tile, tile))


def test_tokens_that_no_row_sees_are_not_read():
    """Hidden tokens lie on pages of their own, which the page table still names."""
    pattern = BigBird(8, 2, 1, 3)
    case = make_case(LayerSpec(0, 2, 1, 8, 8, 0.35), [(160, 1), (160, 24)], 8)
    at = torch.arange(160)
    for b, first in enumerate([159, 136]):
        seen = (
            pattern.visible(torch.arange(first, 160)[:, None], at).any(dim=0).unflatten(0, (-1, 8)).any(dim=1)
        )
        assert not seen.all()
        hidden = case.batch.device.page_table[b][~seen].long()
        case.cache.keys[hidden] = case.cache.values[hidden] = torch.nan
    assert interpreted(case, pattern).isfinite().all()


def test_tokens_on_a_missing_page_are_invisible():
    case = make_case(LayerSpec(0, 2, 1, 4, 4, 0.5), [(100, 1), (90, 20), (7, 1)], 4)
    for b, gone in ((0, range(1, 17)), (1, range(3))):
        case.cache.keys[case.batch.device.page_table[b, gone].long()] = torch.nan
        case.batch.device.page_table[b, gone] = 0
    tile = Tile(64, 16, 4, 1, 16, 2)  # some parts see nothing at all
    assert_equal(case, Full(), tiles=(tile, tile))


@pytest.mark.parametrize(
    ("dtype", "query_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16),
    ],
)
def test_a_cache_in_another_dtype_than_the_model(dtype, query_dtype):
    case = make_case(LayerSpec(0, 4, 2, 8, 8, 0.35), [(40, 1), (20, 20)], 8, dtype=dtype)
    case.query = torch.randn(case.query.shape).to(query_dtype)
    result = interpreted(case, Full())
    assert result.dtype == query_dtype
    torch.testing.assert_close(result, compute(Reference(), case, Full()), rtol=0.03, atol=0.03)


def test_queries_that_lie_apart():
    case = make_case(LayerSpec(0, 4, 2, 8, 8, 0.35), [(40, 1), (20, 20)], 8)
    expected = compute(Reference(), case, Full())
    for query in (
        torch.stack([case.query, case.query], dim=1)[:, 1],
        case.query.transpose(0, 1).contiguous().transpose(0, 1),
        case.query.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        case.query = query
        torch.testing.assert_close(interpreted(case, Full()), expected, rtol=1e-5, atol=1e-5)
