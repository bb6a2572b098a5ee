from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionBatch, LayerSpec
from attention.kernels import reference, sdpa
from attention.kernels.base import Kernel, locate
from attention.kernels.reference import Reference
from attention.kernels.sdpa import Sdpa
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import (
    Case,
    attend,
    by_definition,
    layers,
    make_case,
    patterns,
    sequences,
    with_prompts,
)

page_sizes = st.integers(1, 32)
seeds = st.integers(0, 1 << 30)


def compute(
    kernel: Kernel, case: Case, pattern: Pattern, rerotated: torch.Tensor | None = None
) -> torch.Tensor:
    return attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks, rerotated)


@settings(max_examples=15, deadline=None)
@given(layers(features=True), sequences(20, 3), page_sizes, patterns, seeds)
def test_reference_follows_the_definition(layer, shapes, page_size, pattern, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    torch.testing.assert_close(
        compute(Reference(), case, pattern).double(), by_definition(case, pattern), rtol=1e-5, atol=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(layers(), sequences(300, 6), page_sizes, patterns, seeds)
def test_sdpa_equals_reference(layer, shapes, page_size, pattern, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    expected = compute(Reference(), case, pattern)
    torch.testing.assert_close(compute(Sdpa(), case, pattern), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
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


@settings(max_examples=15, deadline=None)
@given(layers(), sequences(300, 8), page_sizes, patterns, seeds)
def test_neighbors_do_not_matter(layer, shapes, page_size, pattern, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    batched = compute(Sdpa(), case, pattern)
    for b in range(len(shapes)):
        rows = batched[case.batch.host.query_starts[b] : case.batch.host.query_starts[b + 1]]
        torch.testing.assert_close(rows, compute(Sdpa(), case.only(b), pattern), rtol=1e-5, atol=1e-5)


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
    assert (case.batch.device.page_table[:, 1:10] == 0).all()
    for kernel in (Reference(), Sdpa()):
        assert compute(kernel, case, pattern).isfinite().all()


class Forgetful(SlidingWindow):
    """Frees pages that its rule does not hide."""

    def visible(self, query_positions, key_positions):
        return Full().visible(query_positions, key_positions)

    def spans(self, positions):
        return Full().spans(positions)


def test_a_missing_page_of_rows_that_see_equally_many_tokens():
    pattern = Forgetful(window=30, sinks=2)
    case = make_case(LayerSpec(0, 2, 1, 4, 4, 0.5), [(100, 1), (100, 1)], 4, pattern=pattern)
    assert (case.batch.device.page_table == 0).any()
    expected = compute(Reference(), case, pattern)
    torch.testing.assert_close(compute(Sdpa(), case, pattern), expected, rtol=1e-5, atol=1e-5)


def test_tokens_on_a_missing_page_are_invisible():
    case = make_case(
        LayerSpec(0, 2, 1, 4, 4, 0.5), [(100, 1), (90, 20), (7, 1)], 4, pattern=Forgetful(window=30, sinks=2)
    )
    expected = compute(Reference(), case, Forgetful(window=30, sinks=2))
    assert expected.isfinite().all()
    torch.testing.assert_close(
        compute(Sdpa(), case, Forgetful(window=30, sinks=2)), expected, rtol=1e-5, atol=1e-5
    )
    # Pages 1 to 16 hold tokens 4 to 67 of the first sequence, which must be as if they had never existed.
    kept = [*range(4), *range(case.batch.host.page_size * 17, 100)]
    case.keys[0], case.values[0] = case.keys[0][kept], case.values[0][kept]
    short = case.only(0)
    short.batch = AttentionBatch.build([len(kept) - 1], [1], [[1] * len(kept)], short.batch.host.page_size)
    torch.testing.assert_close(by_definition(short, Full()).float(), expected[:1], rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(layers(), sequences(200, 4), page_sizes, seeds, st.integers(1, 40), st.integers(0, 9), st.data())
def test_queries_rerotated_toward_the_first_keys(layer, shapes, page_size, seed, window, sinks, data):
    pattern = SlidingWindow(window, sinks)
    pattern.rerotated = data.draw(st.integers(1, sinks + 2), label="rerotated")
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    rerotated = torch.randn(case.query.shape, generator=torch.Generator().manual_seed(seed + 1))
    expected = compute(Reference(), case, pattern, rerotated)
    least = data.draw(st.sampled_from([sdpa._GATHER_BYTES, 1]), label="bytes at once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "_GATHER_BYTES", least)
        torch.testing.assert_close(compute(Sdpa(), case, pattern, rerotated), expected, rtol=1e-5, atol=1e-5)


def test_rerotated_queries_in_half_precision_round_no_logits():
    """Logits of first keys are often large, where half precision would be off by whole weights."""
    pattern = SlidingWindow(40, 4)
    pattern.rerotated = 4
    case = make_case(LayerSpec(0, 4, 2, 16, 16, 2.0), [(90, 1), (80, 30)], 8, dtype=torch.bfloat16)
    result = compute(Sdpa(), case, pattern, -case.query)
    assert result.dtype == torch.bfloat16
    expected = compute(Reference(), case, pattern, -case.query)
    torch.testing.assert_close(result, expected, rtol=0.01, atol=1e-3)


def test_half_precision_stays_where_a_step_rerotates_nothing():
    """Masks are planned in float32, for a step that may rerotate."""
    pattern = SlidingWindow(40, 4)
    pattern.rerotated = 4
    case = make_case(LayerSpec(0, 4, 2, 16, 16, 0.25), [(90, 1), (60, 1), (80, 30)], 8, dtype=torch.bfloat16)
    plain = SlidingWindow(40, 4)
    assert torch.equal(compute(Sdpa(), case, pattern), compute(Sdpa(), case, plain))
    torch.testing.assert_close(
        compute(Sdpa(), case, pattern), compute(Reference(), case, plain), rtol=0.03, atol=0.03
    )


class Agreeing(ContentPattern):
    """Blocks of three tokens whose keys are in the direction of the queries, and the query's own block."""

    name = "agreeing"

    def __init__(self, every: int) -> None:
        self.every = every

    @classmethod
    def from_options(cls, options):
        return cls(int(options["every"]))

    @property
    def options(self):
        return {"every": str(self.every)}

    def summary_of(self, layer, page_size, dtype):
        return torch.Size([1]), dtype

    def update(self, layer, cache, written):
        raise AssertionError("a kernel does not do this")

    def selects(self, positions, prompt_lens):
        return (positions >= prompt_lens) | (positions % self.every == 0)

    def agree(self, layer, query, positions, keys):
        grouped = query.double().unflatten(1, (layer.kv_heads, -1)).sum(dim=2)
        scores = torch.einsum("rkd,lkd->rkl", grouped, keys.double())
        blocks = torch.nn.functional.pad(scores, (0, -len(keys) % 3)).unflatten(2, (-1, 3)).sum(dim=-1)
        at = torch.arange(blocks.shape[2])
        own = (positions // 3)[:, None, None]
        return (at < own) & (blocks > 0) | (at == own)

    def selection(self, layer, query, positions, keys, page_size):
        blocks = self.agree(layer, query, positions, keys).repeat_interleave(3, dim=2)[..., : len(keys)]
        return blocks & (torch.arange(len(keys)) <= positions[:, None, None])

    def select(self, layer, query, rows, cache):
        batch, found = rows.batch, []
        for i, row in enumerate(rows.rows.tolist()):
            at = batch.positions[row : row + 1]
            slots, _ = locate(batch, batch.owners[row], torch.arange(int(batch.positions.max()) + 1))
            keys = cache.keys.flatten(0, 1)[slots]
            keys[int(at) + 1 :] = 0
            blocks = self.agree(layer, query[i : i + 1], at, keys)[0]
            begin = torch.arange(blocks.shape[1]) * 3
            end = (begin + 3).minimum(at + 1)
            found.append(torch.stack([begin.expand_as(blocks), end.where(blocks, begin)], dim=-1))
        return torch.stack(found)


@settings(max_examples=12, deadline=None)
@given(layers(), sequences(90, 3), page_sizes, seeds, st.integers(2, 9), st.data())
def test_rows_that_select_by_content(layer, shapes, page_size, seed, every, data):
    case = make_case(layer, shapes, page_size, seed=seed)
    prompt_lens = [data.draw(st.integers(1, length + 1)) for length, _ in shapes]
    case.batch = with_prompts(case.batch, prompt_lens)
    expected = compute(Reference(), case, Agreeing(every))
    least = data.draw(st.sampled_from([sdpa._GATHER_BYTES, 1]), label="bytes at once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "_GATHER_BYTES", least)
        patch.setattr(sdpa, "_SELECTING_ROWS", data.draw(st.sampled_from([3, 64])))
        torch.testing.assert_close(compute(Sdpa(), case, Agreeing(every)), expected, rtol=1e-5, atol=1e-5)
