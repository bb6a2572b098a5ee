from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec
from attention.kernels import reference
from attention.kernels.base import Kernel
from attention.kernels.reference import Reference
from attention.kernels.sdpa import Sdpa, _groups
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import Case, by_definition, layers, make_case, patterns, sequences

page_sizes = st.integers(1, 32)
seeds = st.integers(0, 1 << 30)


def compute(kernel: Kernel, case: Case, pattern: Pattern) -> torch.Tensor:
    return kernel.forward(case.layer, case.query, case.cache, case.batch, pattern, case.sinks)


@settings(max_examples=60, deadline=None)
@given(layers(features=True), sequences(20, 3), page_sizes, patterns, seeds)
def test_reference_follows_the_definition(layer, shapes, page_size, pattern, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    torch.testing.assert_close(
        compute(Reference(), case, pattern).double(), by_definition(case, pattern), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=200, deadline=None)
@given(layers(), sequences(300, 6), page_sizes, patterns, seeds)
def test_sdpa_equals_reference(layer, shapes, page_size, pattern, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    expected = compute(Reference(), case, pattern)
    torch.testing.assert_close(compute(Sdpa(), case, pattern), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    layers(), sequences(300, 6), page_sizes, patterns, seeds, st.sampled_from([torch.bfloat16, torch.float16])
)
def test_sdpa_in_half_precision_errs_by_that_precision(layer, shapes, page_size, pattern, seed, dtype):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    result = compute(Sdpa(), case, pattern)
    assert result.dtype == dtype
    # Logits, weights and the sum are each rounded; values reach about 4.
    error = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, compute(Reference(), case, pattern), rtol=error, atol=error)


@pytest.mark.parametrize("kernel", [Reference(), Sdpa()])
def test_a_cache_of_fewer_bits_than_the_model(kernel):
    case = make_case(LayerSpec(0, 4, 2, 8, 8, 0.35), [(40, 1), (30, 12), (20, 20)], 8, dtype=torch.bfloat16)
    case.query = case.query.float()
    result = compute(kernel, case, Full())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), by_definition(case, Full()), rtol=0.03, atol=0.03)


@settings(max_examples=60, deadline=None)
@given(layers(), sequences(300, 8), page_sizes, patterns, seeds)
def test_neighbors_do_not_matter(layer, shapes, page_size, pattern, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    together = compute(Sdpa(), case, pattern)
    for b in range(len(shapes)):
        rows = together[case.batch.query_starts[b] : case.batch.query_starts[b + 1]]
        torch.testing.assert_close(rows, compute(Sdpa(), case.alone(b), pattern), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40, 600, 1500])
def test_long_sequences(window):
    """Several blocks of torch's kernels, some of them masked as a whole; several blocks of rows."""
    layer = LayerSpec(0, 2, 1, 16, 16, 0.25, window=window)
    case = make_case(layer, [(1700, 1), (1700, 1700), (1700, 700), (3, 1), (900, 1)], 16)
    torch.testing.assert_close(
        compute(Sdpa(), case, Full()), compute(Reference(), case, Full()), rtol=1e-5, atol=1e-5
    )


def test_reference_in_blocks_of_rows_equals_one_block(monkeypatch):
    layer = LayerSpec(0, 4, 2, 8, 8, 0.3, window=30, softcap=2.0, sinks=True)
    case = make_case(layer, [(70, 50), (33, 1)], 8)
    expected = compute(Reference(), case, Full())
    monkeypatch.setattr(reference, "_LOGITS_BYTES", 4 * 4 * 70 * 3)
    torch.testing.assert_close(compute(Reference(), case, Full()), expected, rtol=1e-6, atol=1e-6)


def test_expired_pages_are_not_read():
    pattern = SlidingWindow(window=5, sinks=2)
    case = make_case(LayerSpec(0, 2, 1, 4, 4, 0.5), [(100, 1), (90, 20)], 4, pattern=pattern)
    assert (case.batch.page_table[:, 1:10] == 0).all()
    for kernel in (Reference(), Sdpa()):
        assert compute(kernel, case, pattern).isfinite().all()


def test_what_lies_on_a_missing_page_is_invisible():
    class Forgetful(SlidingWindow):
        """Frees pages that its rule does not hide."""

        def visible(self, query_positions, key_positions):
            return key_positions <= query_positions

    case = make_case(
        LayerSpec(0, 2, 1, 4, 4, 0.5), [(100, 1), (90, 20), (7, 1)], 4, pattern=Forgetful(window=30, sinks=2)
    )
    expected = compute(Reference(), case, Forgetful(window=30, sinks=2))
    assert expected.isfinite().all()
    torch.testing.assert_close(
        compute(Sdpa(), case, Forgetful(window=30, sinks=2)), expected, rtol=1e-5, atol=1e-5
    )
    # Pages 1 to 16 hold tokens 4 to 67 of the first sequence, which stays as if they had never been.
    kept = [*range(4), *range(case.batch.page_size * 17, 100)]
    case.keys[0], case.values[0] = case.keys[0][kept], case.values[0][kept]
    short = case.alone(0)
    short.batch.seq_lens = [len(kept)]
    torch.testing.assert_close(by_definition(short, Full()).float(), expected[:1], rtol=1e-5, atol=1e-5)


def test_layers_that_agree_share_a_plan():
    layer = LayerSpec(0, 2, 1, 4, 4, 0.5)
    case = make_case(layer, [(50, 1), (40, 20)], 4)
    pattern = Full()
    compute(Sdpa(), case, pattern)
    plans = dict(case.batch.plans)
    compute(Sdpa(), case, pattern)
    assert case.batch.plans == plans
    assert len(plans) == 1


def test_a_whole_prompt_needs_no_mask():
    case = make_case(LayerSpec(0, 2, 1, 4, 4, 0.5), [(50, 50)], 4)
    compute(Sdpa(), case, Full())
    (plan,) = case.batch.plans.values()
    assert [chunk.mask for chunk in plan.chunks] == [None]


def test_a_window_is_all_that_is_read():
    case = make_case(LayerSpec(0, 2, 1, 4, 4, 0.5, window=10), [(500, 1), (2000, 1500)], 16)
    compute(Sdpa(), case, Full())
    (plan,) = case.batch.plans.values()
    assert [decodes.slots.shape for decodes in plan.decodes] == [(1, 10)]
    assert all(len(chunk.slots) <= chunk.stop - chunk.start + 9 for chunk in plan.chunks)
    assert len(plan.chunks) > 1


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_padding_never_doubles_the_work(lengths):
    case = make_case(LayerSpec(0, 1, 1, 1, 1, 1.0), [(1, 1)], 1)
    case.batch.seq_lens = lengths
    groups = _groups(case.batch, list(range(len(lengths))), None)
    assert sorted(b for group in groups for b in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[b] for b in group)
        assert longest <= 128 or all(longest <= 2 * lengths[b] for b in group)
    assert len(groups) <= 1 + 6  # 5000 / 128 is below 2 ** 6
