"""The write to the paged cache against ``LayerCache.write``, by Triton's interpreter.

``test_triton`` runs this file in a process of its own.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attention import LayerSpec
from attention.dtypes import CACHE_DTYPES
from attention.forward import LayerCall
from attention.hook import Step
from attention.kernels import triton_write
from attention.kernels.triton_paged import Triton
from attention.types import LayerCache
from tests.interpreter import replace_language_once

torch.set_num_threads(1)
replace_language_once()

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

# How many of float32's digits each dtype cuts off.
CUT = {torch.bfloat16: 16, torch.float16: 13, torch.float8_e4m3fn: 20}


@pytest.fixture(autouse=True)
def overflow():
    """numpy, which interprets, says when a number becomes infinite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def poisoned(
    pages: int, page_size: int, heads: int, sizes: tuple[int, int], dtype: torch.dtype
) -> LayerCache:
    keys, values = (torch.full((pages, page_size, heads, size), torch.nan).to(dtype) for size in sizes)
    return LayerCache(keys, values)


def assert_writes_equal(
    key: torch.Tensor, value: torch.Tensor, slots: list[int], dtype: torch.dtype, page_size: int = 4
) -> None:
    """Every bit of the cache is the same; except that machines make different NaNs."""
    pages = max(slots) // page_size + 2
    sizes = key.shape[2], value.shape[2]
    expected, own = (poisoned(pages, page_size, key.shape[1], sizes, dtype) for _ in range(2))
    at = torch.tensor(slots)
    expected.write(at, key, value)
    triton_write.write(own, at, key, value)
    for one, other in zip(expected[:2], own[:2], strict=True):
        bits = WHOLE[dtype.itemsize]
        different = one.view(bits) != other.view(bits)
        if dtype != torch.float8_e4m3fn:
            different &= ~(one.isnan() & other.isnan())
        assert not different.any()


def spread(numbers: torch.Tensor, how: str, dtype: torch.dtype) -> torch.Tensor:
    """The same ``[T, H, D]``, with other strides and NaN around."""
    rows, heads, size = numbers.shape
    if how == "merged":  # as part of a row of queries, keys and values
        place = torch.full((rows, heads + 3, size), torch.nan, dtype=dtype)[:, 2 : 2 + heads]
    elif how == "heads first":
        place = torch.full((heads, rows, size), torch.nan, dtype=dtype).transpose(0, 1)
    else:
        place = torch.full((rows, size, heads + 1), torch.nan, dtype=dtype)[:, :, 1:].transpose(1, 2)
    return place.copy_(numbers)


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True),
    st.integers(1, 7),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 9),
    st.sampled_from(FLOATS),
    st.sampled_from(list(CACHE_DTYPES.values())),
    st.sampled_from(["merged", "heads first", "numbers apart"]),
    st.integers(0, 1 << 30),
)
def test_any_shape_and_strides(slots, heads, size, value_size, page_size, dtype, cached, how, seed):
    random = torch.Generator().manual_seed(seed)
    key, value = (
        spread(torch.randn(len(slots), heads, n, generator=random), how, dtype) for n in (size, value_size)
    )
    assert_writes_equal(key, value, slots, cached, page_size)


def test_heads_that_take_several_programs():
    key, value = torch.randn(2, 11, 256).bfloat16(), torch.randn(2, 11, 80).bfloat16()
    assert_writes_equal(key, value, [9, 2], torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "cached"),
    [pair for pair in itertools.product(FLOATS[1:], CACHE_DTYPES.values()) if pair[0] != pair[1]],
)
def test_every_number_of_16_bits(dtype, cached):
    numbers = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype).view(1, 16, 4096)
    assert_writes_equal(numbers, numbers[:, :, :1], [3], cached)


@pytest.mark.parametrize("cached", CUT)
def test_numbers_of_32_bits_at_and_beside_the_middle_of_two(cached):
    random = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (1 << 13,), generator=random)

    cut = CUT[cached] + draw(0, 12)  # small numbers lose more digits
    bits = (draw(0, 1 << 32) >> cut << cut) + (1 << (cut - 1)) + draw(-1, 2)
    largest = torch.finfo(cached).max
    edges = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, -largest, 464.0, -464.0, 465.0]
    )
    numbers = torch.cat([bits.to(torch.int32).view(torch.float32), edges])
    numbers = torch.cat([numbers, numbers * 2.0**-110, numbers.clamp(-1, 1) * largest * 1.05])
    assert_writes_equal(numbers.view(1, 1, -1), numbers[None, None, :1], [2], cached)


def test_a_step_writes_so(monkeypatch):
    """A step writes by the kernel's own program."""
    written = []
    monkeypatch.setattr(triton_write, "write", lambda *arguments: written.append(arguments))
    from attention import AttentionBatch, PagedCache
    from attention.backends import resolve

    layer = LayerSpec(0, 2, 1, 8, 4, 0.3)
    attention = resolve("full", {}, "triton", [layer], "cpu", torch.float32, 4)
    assert isinstance(attention.kernel, Triton)
    cache = PagedCache([layer], 3, 4, torch.float32, pattern=attention.pattern)
    batch = AttentionBatch.build([0], [3], [[1]], 4)
    cache.layers[0].keys.zero_()
    cache.layers[0].values.zero_()
    step = Step(attention, cache, batch, {0: layer})
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 4)

    class Module:
        layer_idx = 0

    step.attend(LayerCall(Module(), query, key, value, None, {}))
    ((found, slots, keys, values),) = written
    assert found is cache.layers[0]
    assert slots is batch.device.slots
    assert torch.equal(keys, key[0].transpose(0, 1))
    assert torch.equal(values, value[0].transpose(0, 1))
