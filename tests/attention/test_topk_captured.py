"""``topk`` in captured steps: the same keys as by its definition and in C++."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attention import LayerSpec
from attention.dtypes import CACHE_DTYPES
from attention.patterns import blocks
from attention.patterns.blocks import CapturedRows
from attention.patterns.topk import TopK, _highest
from attention.patterns.written import Written
from attention.step import DeviceBatch
from attention.transfer import device_only
from tests.attention.cases import layers, make_case, selection, sequences
from tests.attention.test_cpu_select import Native, ties

# No page of any cache: to read it is an error.
NOWHERE = 1 << 30


def wide(batch: DeviceBatch, more: int = 3) -> torch.Tensor:
    """The page table with so many more columns, which hold no page of the sequences."""
    table = torch.full((len(batch.page_table), batch.page_table.shape[1] + more), NOWHERE, dtype=torch.int32)
    for b, (row, own) in enumerate(zip(table, batch.page_table, strict=True)):
        count = int(batch.positions[batch.owners == b].max()) // batch.page_size + 1
        row[:count] = own[:count]
    return table


def captured(batch: DeviceBatch, rows: torch.Tensor) -> DeviceBatch:
    return DeviceBatch.captured(batch.owners[rows], batch.positions[rows], wide(batch), batch.page_size)


class Captured(TopK):
    """``TopK`` whose rows select as in a captured step."""

    def select(self, layer, query, rows, cache):
        step = captured(rows.batch, rows.rows)
        with device_only():
            return super().select(layer, query, CapturedRows(step), cache)


topks = [st.integers(1, 90), st.integers(0, 3), st.integers(1, 4), st.sampled_from(["dense", "sparse"])]


@settings(max_examples=15, deadline=None)
@given(
    layers(),
    sequences(120, 5),
    st.integers(1, 9),
    st.tuples(*topks),
    st.integers(0, 1 << 30),
    st.booleans(),
    st.sampled_from(list(CACHE_DTYPES.values())),
    st.sampled_from([1, 1 << 14, 64 << 20]),
)
def test_a_captured_selection_is_that_of_the_definition_and_of_cpp(
    layer, shapes, page_size, numbers, seed, tied, dtype, block_bytes
):
    pattern, native = Captured(*numbers), Native(*numbers)
    lens = [length // 2 for length, _ in shapes]
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype, prompt_lens=lens)
    if tied:
        ties(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BYTES", block_bytes)
        found = list(selection(case, pattern))
    in_cpp = list(selection(case, native))
    assert sum(len(selected) for selected, _ in found) == len(case.batch.visible.selecting(pattern))
    for (selected, defined), (other, _) in zip(found, in_cpp, strict=True):
        assert torch.equal(selected, defined)
        assert torch.equal(selected, other)


@settings(max_examples=12, deadline=None)
@given(
    layers(),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 9),
    st.sampled_from(list(CACHE_DTYPES.values())),
)
def test_summaries_are_those_of_a_step_that_the_host_knows(layer, lengths, page_size, dtype):
    pattern = TopK(64, 1, 1)
    shapes = [(length, 1) for length in lengths]
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, prompt_lens=[1] * len(lengths))
    summary = case.cache.summary
    pages = Written.known(case.batch.host, case.batch.device).pages
    expected = summary.clone()
    summary[pages] = torch.nan
    step = captured(case.batch.device, torch.arange(len(lengths)).repeat(2))  # as batches are filled up
    with device_only():
        pattern.update(layer, case.cache, Written.captured(step))
    # Page 0 is no sequence's; all others are unchanged, to the bit.
    assert torch.equal(summary[1:].view(torch.uint8), expected[1:].view(torch.uint8))


class Operators(TorchDispatchMode):
    """Records every operator, with the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.done.append((str(func), getattr(result, "shape", None)))
        return result


def test_the_same_operators_run_for_any_numbers():
    layer, pattern = LayerSpec(0, 6, 2, 8, 8, 0.35, window=50), TopK(24, 1, 2)
    case = make_case(layer, [(130, 1), (64, 1), (7, 1)], 4, pattern=pattern, prompt_lens=[1, 1, 1])
    steps = []
    for order in ([2, 0, 1, 0], [1, 1, 1, 1]):
        at = torch.tensor(order)
        step, query = captured(case.batch.device, at), case.query[at]
        with Operators() as operators, device_only():
            pattern.update(layer, case.cache, Written.captured(step))
            pattern.select(layer, query, CapturedRows(step), case.cache)
        steps.append(operators.done)
    assert steps[0] == steps[1]
    assert len(steps[0]) > 20


@given(
    st.lists(
        st.floats(width=32, allow_subnormal=False)
        | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan]),
        min_size=1,
        max_size=40,
    ),
    st.data(),
)
def test_the_highest_are_those_of_a_stable_sort(numbers, data):
    scores = torch.tensor(numbers)
    count = data.draw(st.integers(0, len(numbers)))
    expected = scores.sort(descending=True, stable=True).indices[:count]
    assert torch.equal(_highest(scores, count).sort().values, expected.sort().values)
    # A NaN of the other sign is one like any other.
    assert torch.equal(_highest(torch.where(scores.isnan(), -scores, scores), count), _highest(scores, count))
