"""Plans of gathering kernels read the visible tokens, and few more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attention import AttentionBatch, LayerSpec
from attention.kernels.plan import Block, Plan, groups, plan_batch
from attention.patterns.base import Pattern
from attention.patterns.bigbird import BigBird
from attention.patterns.full import Full
from attention.patterns.longformer import Longformer
from attention.patterns.segment import Segment
from attention.patterns.sliding_window import SlidingWindow
from attention.visible import Visible
from tests.attention.cases import make_case, patterns, sequences

SMALL = LayerSpec(0, 1, 1, 1, 1, 1.0)


def plan(shapes: list[tuple[int, int]], pattern: Pattern, window: int | None = None) -> Plan:
    batch = make_case(SMALL, shapes, 16, pattern=pattern).batch
    return plan_batch(batch, window, pattern, torch.float32)


def cells(blocks: list[Block]) -> int:
    return sum((block.stop - block.start) * len(block.slots) for block in blocks)


@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(60, 4), Segment(64, 4)])
def test_a_whole_prompt_needs_no_mask(pattern):
    (block,) = plan([(50, 50)], pattern).blocks
    assert block.mask is None
    assert len(block.slots) == 50


def test_sequences_of_one_length_need_no_mask():
    (rows,) = plan([(50, 1), (50, 1)], Full()).rows
    assert rows.mask is None


def test_a_window_is_all_that_is_read():
    for planned in (
        plan([(500, 1), (2000, 1500)], Full(), 10),
        plan([(500, 1), (2000, 1500)], SlidingWindow(10, 0)),
    ):
        assert [rows.slots.shape for rows in planned.rows] == [(1, 10)]
        assert all(len(block.slots) <= block.stop - block.start + 9 for block in planned.blocks)
        assert len(planned.blocks) > 1


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        # Tokens that a row sees on average in rows 3584 to 4095.
        (SlidingWindow(1020, 4), 1024),
        (SlidingWindow(60, 4), 64),
        (Segment(512, 4), 768),
        (BigBird(64, 3, 3, 0), 64 * 6.5),
        (Longformer(512, 16), 528),
    ],
)
def test_a_chunk_is_cut_where_its_rows_see_different_keys(pattern, seen):
    blocks = plan([(4096, 512)], pattern).blocks
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == 512
    assert cells(blocks) <= 512 * (seen + 128)


def test_a_chunk_of_a_dense_pattern_is_not_cut_finely():
    blocks = plan([(8192, 512)], Full()).blocks
    assert len(blocks) == 1


@settings(max_examples=30, deadline=None)
@given(sequences(400, 4), patterns, st.none() | st.integers(1, 100))
def test_every_row_is_planned_once(shapes, pattern, window):
    planned = plan(shapes, pattern, window)
    rows = [row for group in planned.rows for row in group.items.tolist()]
    rows += [row for block in planned.blocks for row in range(block.start, block.stop)]
    assert sorted(rows) == list(range(sum(count for _, count in shapes)))


class Largest(TorchDispatchMode):
    """Records the most elements that any operator's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("pattern", "window"),
    [(SlidingWindow(60, 4), None), (Full(), 64), (Longformer(48, 16), None), (BigBird(8, 3, 4, 0), None)],
)
def test_planning_is_in_proportion_to_what_is_visible(pattern, window):
    batch = make_case(SMALL, [(100_000, 1), (100_000, 1), (50_000, 1)], 16, pattern=pattern).batch
    # A pattern computes a stretch of positions, which later steps look up.
    plan_batch(AttentionBatch(Visible(batch.host), batch.device), window, pattern, torch.float32)
    with Largest() as largest:
        plan_batch(batch, window, pattern, torch.float32)
    assert 64 < largest.elements <= 3 * 64
    chunk = make_case(SMALL, [(100_000, 128)], 16, pattern=pattern).batch
    with Largest() as largest:
        plan_batch(chunk, window, pattern, torch.float32)
    # Blocks of 64 rows; small blocks of keys differ among them.
    assert largest.elements <= 64 * 400


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.none() | st.integers(1, 20_000))
def test_padding_at_most_doubles_the_tokens_read(counts, most):
    found = groups(counts, most)
    assert sorted(i for group in found for i in group) == list(range(len(counts)))
    for group in found:
        longest = counts[group[0]]
        assert longest == max(counts[i] for i in group)
        assert longest <= 128 or all(longest <= 2 * counts[i] for i in group)
        assert most is None or len(group) == 1 or longest * len(group) <= most
    if most is None:
        assert len(found) <= 1 + 6  # 5000 / 128 is below 2 ** 6
