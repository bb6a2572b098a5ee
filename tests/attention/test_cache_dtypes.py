"""Queries in one dtype over keys and values in another; numbers beyond a dtype's range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.cache import PagedCache
from attention.dtypes import CACHE_DTYPES, cast
from attention.kernels.base import Kernel
from attention.kernels.cpu.paged import CpuPaged
from attention.kernels.reference import Reference
from attention.kernels.sdpa import Sdpa
from attention.kernels.sdpa_flash import SdpaFlash
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from attention.types import LayerSpec
from tests.attention.cases import (
    Case,
    attend,
    by_definition,
    content_patterns,
    layers,
    make_case,
    patterns,
    sequences,
)
from tests.instructions import multiplies_bfloat16

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
CACHED = st.sampled_from(list(CACHE_DTYPES.values()))
SHORT = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
PLAIN = LayerSpec(0, 6, 2, 16, 16, 0.25)

page_sizes = st.integers(1, 32)
seeds = st.integers(0, 1 << 30)


def compute(
    kernel: Kernel, case: Case, pattern: Pattern, rerotated: torch.Tensor | None = None
) -> torch.Tensor:
    return attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks, rerotated)


def check(kernel: Kernel, case: Case, pattern: Pattern, query_dtype: torch.dtype, seed: int) -> None:
    """Against the oracle over the same cache, with queries of more bits than it has."""
    random = torch.Generator().manual_seed(seed + 1)
    case.query = torch.randn(case.query.shape, generator=random).to(query_dtype)
    rerotated = None
    if pattern.rerotated:
        rerotated = torch.randn(case.query.shape, generator=random).to(query_dtype)
    result = compute(kernel, case, pattern, rerotated)
    assert result.dtype == query_dtype
    error = 1e-5
    if query_dtype != torch.float32:  # the result, and logits where keys have the same dtype
        error = 4 * torch.finfo(query_dtype).eps
    elif isinstance(kernel, CpuPaged) and case.cache.keys.dtype == torch.bfloat16 and multiplies_bfloat16():
        error = 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(result, compute(Reference(), case, pattern, rerotated), rtol=error, atol=error)


@pytest.mark.parametrize("kernel", [CpuPaged(), Sdpa(), SdpaFlash()], ids=lambda kernel: kernel.name)
def test_every_kernel_takes_queries_of_other_dtypes(kernel):
    @settings(max_examples=20, deadline=None)
    @given(layers(), sequences(200, 4), page_sizes, patterns, seeds, CACHED, DTYPES)
    def run(layer, shapes, page_size, pattern, seed, dtype, query_dtype):
        if isinstance(kernel, SdpaFlash):
            layer, pattern = PLAIN, Full()
        case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
        check(kernel, case, pattern, query_dtype, seed)

    run()


@pytest.mark.parametrize("kernel", [CpuPaged(), Sdpa()], ids=lambda kernel: kernel.name)
def test_rows_that_select_by_content(kernel):
    """The selection is by the rounded keys, with summaries as in the oracle."""

    @settings(max_examples=12, deadline=None)
    @given(layers(), sequences(150, 3), page_sizes, content_patterns(), seeds, CACHED, st.data())
    def run(layer, shapes, page_size, pattern, seed, dtype, data):
        prompt_lens = [data.draw(st.integers(1, length + 1)) for length, _ in shapes]
        case = make_case(
            layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed, prompt_lens=prompt_lens
        )
        check(kernel, case, pattern, torch.float32, seed)

    run()


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("kernel", [CpuPaged(), Sdpa()], ids=lambda kernel: kernel.name)
def test_rerotated_queries(kernel, dtype):
    pattern = SlidingWindow(20, 4)
    pattern.rerotated = 4
    case = make_case(PLAIN, [(90, 1), (80, 30)], 8, pattern=pattern, dtype=dtype)
    check(kernel, case, pattern, torch.float32, 0)


@pytest.mark.parametrize("dtype", SHORT)
def test_the_oracle_reads_the_rounded_keys(dtype):
    case = make_case(PLAIN, [(40, 1), (30, 12)], 8, dtype=dtype)
    case.query = torch.randn(case.query.shape)
    expected = by_definition(case, Full())
    torch.testing.assert_close(compute(Reference(), case, Full()).double(), expected, rtol=1e-5, atol=1e-5)


@given(st.lists(st.floats(width=32), min_size=1), DTYPES, DTYPES)
def test_numbers_beyond_a_dtype_become_nan(numbers, own, dtype):
    wide = torch.tensor(numbers).to(own)
    before = wide.clone()
    result = cast(wide, dtype)
    assert result.dtype == dtype
    rounded = wide.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(own).max:
        rounded = rounded.where(rounded.isfinite(), torch.nan)
    torch.testing.assert_close(result, rounded, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_the_nearest_of_8_bits_and_beyond_them_to_nan(own):
    """All numbers of float16, or those of float32 that lie about them, against a search among all codes."""
    wide = torch.arange(1 << 16).int().short().view(torch.float16).float()
    if own == torch.float32:
        wide = torch.cat([wide, wide.nextafter(wide.new_tensor(0.0)), wide * 1.0001, wide * 1e30])
    wide = wide.to(own)
    codes = torch.arange(127, dtype=torch.uint8)
    known = codes.view(torch.float8_e4m3fn).double()
    size = wide.double().abs()
    above = torch.searchsorted(known, size).clamp(1, 126)
    down, up = size - known[above - 1], known[above] - size
    nearest = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    # With more exponents, the number after 448 would be 480.
    nearest = nearest.where(size <= 464, 127) | wide.signbit() * 128
    found = cast(wide, torch.float8_e4m3fn).view(torch.uint8).long()
    held = size <= 464
    assert torch.equal(found[held], nearest[held])
    assert (found[~held] % 128 == 127).all()
    assert 0 < held.sum() < len(held)


@pytest.mark.parametrize("saturating", [False, True])
def test_too_large_numbers_become_nan_in_every_version_of_torch(saturating, monkeypatch):
    """Some versions give the largest number, others NaN."""
    to = torch.Tensor.to

    def convert(tensor, dtype):
        assert dtype == torch.float8_e4m3fn
        fits = tensor.isnan() | (tensor.abs() <= 464)
        return to(tensor.where(fits, 448.0 if saturating else torch.nan), dtype)

    monkeypatch.setattr(torch.Tensor, "to", convert)
    result = cast(torch.tensor([464.0, 465.0, -1e9, float("inf"), 1.0]), torch.float8_e4m3fn)
    monkeypatch.undo()
    assert torch.equal(result.float().nan_to_num(nan=-1), torch.tensor([448.0, -1, -1, -1, 1]))


@pytest.mark.parametrize("kernel", [Reference(), CpuPaged(), Sdpa()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize(("dtype", "number"), [(torch.float16, 7e4), (torch.float8_e4m3fn, 500.0)], ids=str)
def test_a_number_beyond_the_dtype_shows_in_every_query_that_sees_it(kernel, part, dtype, number):
    """Infinity could go unnoticed: a query of the opposite direction would give the token no weight."""
    cache = PagedCache([PLAIN], 11, 8, dtype).layers[0]
    case = make_case(PLAIN, [(60, 60), (10, 10)], 8, dtype=dtype)
    key, value = torch.ones(70, 2, 16), torch.ones(70, 2, 16)
    (key if part == "key" else value)[20, 0, 3] = number
    cache.write(case.batch.device.slots, key, value)
    case.cache, case.query = cache, -torch.ones(70, 6, 16)
    failed = compute(kernel, case, Full()).isnan().any(dim=2)
    assert failed[20:60, :3].all()
    assert not failed[:, 3:].any()
    assert not failed[60:].any()
