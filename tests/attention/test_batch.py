"""One step's batch: impossible steps, agreement of host and device, and plans made once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention import AttentionBatch, LayerSpec, PagedCache, Step, UnsupportedError, resolve
from attention.forward import LayerCall
from attention.kernels.base import Kind, locate
from attention.kernels.reference import Reference
from attention.kernels.step_plans import StepPlans
from attention.kernels.triton_paged import Triton
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.lsh import Lsh
from attention.patterns.oracle import Oracle
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from attention.reading import pages_of
from attention.step import DeviceBatch, StepBatch
from attention.transfer import device_only
from attention.visible import Visible
from tests.attention.cases import make_case
from tests.attention.test_topk_captured import Operators, captured

LAYER = LayerSpec(0, 4, 2, 8, 8, 0.35)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]], int, list[int]]:
    """Arguments of ``AttentionBatch.build``: decodes, or chunks among them."""
    size, page_size = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    computed = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))
    longest = draw(st.sampled_from([1, 9]))
    counts = draw(st.lists(st.integers(1, longest), min_size=size, max_size=size))
    prompts = draw(st.lists(st.integers(1, 60), min_size=size, max_size=size))
    needed = [-(-(have + add) // page_size) for have, add in zip(computed, counts, strict=True)]
    ends = list(accumulate(needed))
    pages = [list(range(end, end - count, -1)) for end, count in zip(ends, needed, strict=True)]
    return computed, counts, pages, page_size, prompts


@given(steps())
def test_host_and_device_know_the_same_rows(step):
    computed, counts, pages, page_size, prompts = step
    batch = AttentionBatch.build(computed, counts, pages, page_size, prompt_lens=prompts)
    expected = [
        (b, have + i, pages[b][(have + i) // page_size] * page_size + (have + i) % page_size, prompts[b])
        for b, (have, add) in enumerate(zip(computed, counts, strict=True))
        for i in range(add)
    ]
    host, device = batch.host, batch.device
    assert list(zip(host.owners, host.positions, device.slots, host.row_prompt_lens, strict=True)) == expected
    assert device.owners.tolist() == host.owners.tolist()
    assert device.positions.tolist() == host.positions.tolist()
    assert {device.owners.dtype, device.positions.dtype, device.slots.dtype} == {torch.int64}
    assert {array.dtype.name for array in (host.owners, host.positions, host.row_prompt_lens)} == {"int64"}
    assert host.query_starts == tuple(accumulate(counts, initial=0))
    assert host.seq_lens == tuple(map(sum, zip(computed, counts, strict=True)))
    assert host.decode_only == (max(counts) == 1)
    assert [host.query_len(b) for b in range(host.size)] == counts


@given(steps())
def test_a_captured_step_writes_to_the_same_slots(step):
    computed, counts, pages, page_size, _ = step
    device = AttentionBatch.build(computed, counts, pages, page_size).device
    own = DeviceBatch.captured(device.owners, device.positions, device.page_table, page_size)
    assert torch.equal(own.slots, device.slots)
    assert torch.equal(locate(own, own.owners, own.positions)[0], device.slots)


@pytest.mark.parametrize(
    ("computed", "counts", "page_size", "prompt_lens"),
    [
        ([], [], 4, None),
        ([3, 4], [1], 4, None),
        ([3], [1], 4, [3, 3]),
        ([3, 4], [1, 0], 4, None),
        ([-1], [1], 4, None),
        ([3], [1], 0, None),
    ],
)
def test_an_impossible_step_is_refused(computed, counts, page_size, prompt_lens):
    with pytest.raises(ValueError, match="a step"):
        StepBatch(computed, counts, page_size, prompt_lens)


def test_parts_of_different_steps_make_no_batch():
    one = AttentionBatch.build([3, 5], [1, 1], [[1], [2, 3]], 4)
    other = AttentionBatch.build([3], [2], [[1, 2]], 4)
    wide = AttentionBatch.build([3, 5], [1, 1], [[1], [2]], 8)
    for host, device in ((one.host, other.device), (other.host, one.device), (one.host, wide.device)):
        with pytest.raises(ValueError, match=r"pages of 4 tokens|different sequences"):
            AttentionBatch(Visible(host), device)
    with pytest.raises(ValueError, match="pages of 1 sequences for 2"):
        AttentionBatch.build([3, 5], [1, 1], [[1]], 4)
    with pytest.raises(ValueError, match="one number for each query token"):
        replace(one.device, slots=one.device.slots[:1])
    with pytest.raises(ValueError, match="rows of pages"):
        replace(one.device, page_table=one.device.page_table[0])


def test_nothing_of_a_step_is_changed_later():
    batch = AttentionBatch.build([3], [1], [[1]], 4)
    for part, name in ((batch, "visible"), (batch.host, "seq_lens"), (batch.device, "slots")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, None)


class Counting(Reference):
    """Records its plans."""

    def __init__(self) -> None:
        self.planned: list[Kind] = []

    def plan(self, kind, batch):
        self.planned.append(kind)
        return super().plan(kind, batch)


class Counted(Full):
    """Counts how often it computes ranges of more positions than are looked up."""

    asked = 0
    dense = False

    def spans(self, positions):
        self.asked += 1
        return super().spans(positions)


def test_a_plan_is_made_once_for_a_step_and_kind():
    layers = [replace(LAYER, index=i, window=window) for i, window in enumerate([None, 9, None, 9])]
    kernel = Counting()
    found = resolve("full", {}, "reference", layers, "cpu", torch.float32, 4)
    attention = replace(found, kernel=kernel)
    cache = PagedCache(layers, 9, 4, torch.float32)
    by_index = {layer.index: layer for layer in layers}

    def compute(begin: int, dtype: torch.dtype = torch.float32) -> None:
        batch = AttentionBatch.build([begin], [1], [[1, 2, 3]], 4)
        step = Step(attention, cache, batch, by_index)
        for layer in layers:

            class Module:
                layer_idx = layer.index

            heads = (torch.ones(1, count, 1, 8, dtype=dtype) for count in (4, 2, 2))
            step.attend(LayerCall(Module(), *heads, None, {}))

    compute(0)
    assert [(kind.layer.window, kind.layer.index) for kind in kernel.planned] == [(None, 0), (9, 0)]
    compute(1)
    assert len(kernel.planned) == 4
    compute(2, torch.bfloat16)
    assert [kind.query_dtype for kind in kernel.planned[4:]] == [torch.bfloat16] * 2


def test_ranges_are_computed_once_for_layers_and_the_count_of_pages():
    layers = tuple(replace(LAYER, index=i) for i in range(3))
    pattern = Counted()
    attention = replace(
        resolve("full", {}, "sdpa", list(layers), "cpu", torch.float32, 4), pattern=pattern, layers=layers
    )
    batch = AttentionBatch.build([0], [40], [list(range(1, 11))], 4)
    plans = attention.plans(batch)
    cache = PagedCache(list(layers), 11, 4, torch.float32)
    for layer in layers:
        attention.forward(layer, torch.ones(40, 4, 8), cache.layers[layer.index], plans)
    pages_of(attention, batch.visible)
    assert pattern.asked == 1
    attention.plans(AttentionBatch(Visible(batch.host), batch.device)).of(
        Kind.of(LAYER, pattern, torch.ones(40, 4, 8), cache.layers[0])
    )
    assert pattern.asked == 2  # another step shares nothing


def test_written_tokens_are_computed_once_per_step():
    case = make_case(LAYER, [(8, 1), (5, 1)], 4)
    plans = StepPlans(Reference(), case.batch)
    assert plans.written is plans.written
    assert plans.written.pages.tolist() == [int(case.batch.device.page_table[0, 1])]
    assert plans.written.summaries is plans.written.pages
    step = StepPlans(Triton(), captured(case.batch.device, torch.arange(2)))
    own = case.batch.device.slots // 4
    assert step.written.pages.tolist() == own.tolist()
    assert step.written.summaries.tolist() == [int(own[0]), 0]


def test_only_a_capturable_kernel_plans_from_the_devices_part():
    device = make_case(LAYER, [(8, 1)], 4).batch.device
    with pytest.raises(UnsupportedError, match="kernel reference plans every step on the host, and"):
        StepPlans(Reference(), device)
    assert Triton().uncapturable(Full()) is None
    assert Triton().uncapturable(TopK(64, 1, 1)) is None
    assert Triton().uncapturable(Oracle(64, 1, 1)) is not None
    assert Triton().uncapturable(Lsh(1, 2, 1, 0)) == "lsh plans what its queries select on the host"


@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(9, 2), TopK(24, 1, 2)], ids=lambda p: p.name)
def test_a_captured_plan_asks_nothing_of_the_host(pattern: Pattern):
    """And calls the same operators for any numbers."""
    layer = replace(LAYER, window=50)
    case = make_case(layer, [(130, 1), (64, 1), (7, 1)], 4, pattern=pattern, prompt_lens=[1, 1, 1])
    kind, found = Kind.of(layer, pattern, case.query, case.cache), []
    for order in ([2, 0, 1, 0], [1, 1, 1, 1]):
        step = captured(case.batch.device, torch.tensor(order))
        with Operators() as operators, device_only():
            plan = StepPlans(Triton(), step).of(kind)
        found.append(operators.done)
        assert plan.batch is step
        assert bool(plan.selecting) == isinstance(pattern, TopK)
        assert len(plan.ruled) + len(plan.selecting) == 1
    assert found[0] == found[1]
    assert found[0]


@pytest.mark.parametrize("counts", [[1, 1], [40, 1]])
def test_too_few_pages_are_refused(counts):
    """Else a chunk's keys would go to the page that no sequence owns."""
    with pytest.raises(ValueError, match="fewer pages than its tokens need"):
        AttentionBatch.build([16, 16], counts, [[1, 2, 3, 4], [5]], 16)
