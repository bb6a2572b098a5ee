from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attention import LayerSpec
from attention.backends import resolve
from attention.kernels import flex
from attention.kernels.flex import Flex
from attention.kernels.reference import Reference
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from tests.attention.cases import Case, layers, make_case, patterns, sequences

LAYER = LayerSpec(0, 6, 2, 16, 16, 0.25)
CPU = torch.device("cpu")

can_compile = pytest.mark.skipif(bool(flex._lacking_on_cpu()), reason="; ".join(flex._lacking_on_cpu()))


def compute(kernel, case: Case, pattern) -> torch.Tensor:
    return kernel.forward(case.layer, case.query, case.cache, case.batch, pattern, None)


@pytest.fixture
def eager(monkeypatch):
    """FlexAttention by its definition: every pair of a row and a key is asked about."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex._attend)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.usefixtures("eager")
def test_flex_equals_reference():
    @settings(max_examples=40, deadline=None)
    @given(
        layers(),
        sequences(300, 4),
        st.integers(1, 32),
        patterns,
        st.none() | st.floats(0.5, 5),
        st.integers(0, 1 << 30),
    )
    def check(layer, shapes, page_size, pattern, softcap, seed):
        layer = dataclasses.replace(layer, softcap=softcap)
        case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
        expected = compute(Reference(), case, pattern)
        torch.testing.assert_close(compute(Flex(), case, pattern), expected, rtol=1e-5, atol=1e-5)

    check()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    patterns | st.builds(SlidingWindow, st.integers(100, 500), st.just(4)),
)
@example(124, 128, Full())  # the fourth row is the first to see the first block to its end
@example(127, 128, Full())
def test_blocks_are_those_that_are_seen(earlier, count, pattern):
    """The compiled kernel visits listed blocks only, and asks about no pair in whole ones."""
    layer = LayerSpec(0, 1, 1, 1, 1, 1.0)
    case = make_case(layer, [(earlier + count, count)], 16, pattern=pattern)
    mask = flex._plan_chunk(case.batch, 0, 0, count, None, pattern).mask
    rows, columns = mask.shape[-2:]
    seen = mask.mask_mod(None, None, torch.arange(rows)[:, None], torch.arange(columns))
    blocks = seen.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)

    def listed(counts, indices):
        found = torch.zeros(blocks.shape[:2], dtype=torch.bool)
        for row, (number, order) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            found[row, order[:number].long()] = True
        return found

    some = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (some & whole).any()
    assert torch.equal(some | whole, blocks.any(dim=2))
    if isinstance(pattern, Full):
        assert torch.equal(whole, blocks.all(dim=2))
    assert not (whole & ~blocks.all(dim=2)).any()


@pytest.mark.usefixtures("eager")
def test_what_lies_on_a_missing_page_is_invisible():
    class Forgetful(Full):
        """Frees pages that its rule does not hide."""

        def expired(self, seq_len, page_size):
            return range(1, seq_len // page_size - 1)

    case = make_case(LAYER, [(100, 1), (90, 20), (300, 150)], 8, pattern=Forgetful())
    assert (case.batch.page_table[:, 1] == 0).all()
    expected = compute(Reference(), case, Forgetful())
    assert expected.isfinite().all()
    torch.testing.assert_close(compute(Flex(), case, Forgetful()), expected, rtol=1e-5, atol=1e-5)


@can_compile
# Not monkeypatch, which would leave the setting deleted: torch keeps it beside the module, not in it.
@torch._dynamo.config.patch(recompile_limit=1)
def test_one_compilation_serves_chunks_of_all_lengths():
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    pattern = SlidingWindow(200, 4)
    # The first has as many blocks of rows as there are key heads and ranges; that must bind no other.
    shapes = [[(5, 5)], [(300, 300)], [(1000, 600), (90, 1)], [(128, 128), (400, 384)], [(2000, 4)]]
    for chunks in shapes:
        case = make_case(LAYER, chunks, 16, pattern=pattern)
        with torch.inference_mode():
            result = compute(Flex(), case, pattern)
        torch.testing.assert_close(result, compute(Reference(), case, pattern), rtol=1e-5, atol=1e-5)


def unsupported(*layers: LayerSpec, device=CPU, dtype=torch.float32, pattern=None) -> str:
    return "; ".join(Flex().unsupported(list(layers), device, dtype, 16, pattern or Full()))


def test_what_flex_cannot_do_is_refused():
    assert "chooses keys by content" in unsupported(LAYER, pattern=TopK(64, 1, 4, "dense"))
    turned = SlidingWindow(9, 3)
    turned.turned = 3
    assert "in-cache positions" in unsupported(LAYER, pattern=turned)
    sinks = LayerSpec(3, 6, 2, 16, 16, 0.25, sinks=True)
    assert "flex lacks learned sinks (layer 3)" in unsupported(LAYER, sinks)
    assert "not float64" in unsupported(LAYER, dtype=torch.float64)
    assert "not on meta" in unsupported(LAYER, device=torch.device("meta"))
    small = LayerSpec(2, 6, 2, 8, 16, 0.25)
    assert "heads of at least 16 on cuda (layer 2)" in unsupported(LAYER, small, device=torch.device("cuda"))


@can_compile
def test_flex_is_chosen_by_name_only():
    choose = {"layers": [LAYER], "device": "cpu", "dtype": torch.float32, "page_size": 16}
    for backend, options in (("full", {}), ("sliding_window", {}), ("sparse", {"pattern": "bigbird"})):
        assert resolve(backend, options, "flex", **choose).kernel.name == "flex"
        assert resolve(backend, options, "auto", **choose).kernel.name != "flex"


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    flex._lacking_on_cpu.cache_clear()
    try:
        assert "there is no no-such-compiler: install it, or name another in CXX" in unsupported(LAYER)
    finally:
        flex._lacking_on_cpu.cache_clear()
