"""The adapter with xformers' own bias objects and operators' own checks.

``xformers_interpreted.py`` beside this file runs its Triton kernel, and ``gpu_check.py``, which needs a GPU,
the one of flash attention too.
"""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec, UnsupportedError, resolve
from attention.kernels import xformers as adapter
from attention.kernels.base import Kind
from attention.kernels.reference import Reference
from attention.kernels.xformers import Xformers
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.longformer import Longformer
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import Case, attend, make_case, sequences

logging.getLogger("xformers").setLevel(
    logging.ERROR
)  # it has no kernels for a torch without CUDA, and says so
fmha = pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed")

GPU = torch.device("cuda", 0)
PLAIN = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(2)]

# The operators' complaints about a machine without a GPU.
NO_GPU = (
    "device=cpu",
    "operator wasn't built",
    "bf16 is only supported on A100+ GPUs",
    "triton is not available",
)


def by_materialized_bias(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
) -> torch.Tensor:
    """``memory_efficient_attention_forward`` by the bias's own mask, after the operator's own checks."""
    inputs = fmha.Inputs(query, key, value, attn_bias, p, scale, output_dtype)
    inputs.validate_inputs()
    wrong = [reason for reason in op.not_supported_reasons(inputs) if not reason.startswith(NO_GPU)]
    assert wrong == []
    paged = hasattr(attn_bias, "block_tables")
    keys = attn_bias.block_tables.numel() * attn_bias.page_size if paged else key.shape[1]
    mask = attn_bias.materialize((query.shape[1], keys))
    output = torch.empty(query.shape[1:-1] + value.shape[-1:], dtype=query.dtype)
    for row, visible in enumerate(mask == 0):
        seen = visible.nonzero().flatten()
        logits = torch.einsum("kgd,lkgd->kgl", query[0, row].float(), key[0, seen].float()) * scale
        output[row] = torch.einsum("kgl,lkgd->kgd", logits.softmax(dim=-1), value[0, seen].float())
    return output[None]


@st.composite
def layers(draw: st.DrawFn) -> LayerSpec:
    kv_heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([16, 32]))
    return LayerSpec(
        index=0,
        query_heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_size=size,
        value_size=size,
        scale=draw(st.sampled_from([size**-0.5, 0.07])),
        window=draw(st.none() | st.integers(1, 250)),
    )


patterns = st.just(Full()) | st.builds(SlidingWindow, st.integers(1, 200), st.just(0))
shapes = st.one_of(
    sequences(60, 4),
    sequences(300, 2),
    st.lists(st.tuples(st.integers(1, 300), st.just(1)), min_size=1, max_size=6),
)


def compute(case: Case, pattern: Pattern) -> torch.Tensor:
    return attend(Xformers(), case.layer, case.query, case.cache, case.batch, pattern, None)


@settings(max_examples=12, deadline=None)
@given(
    layers(),
    shapes,
    st.sampled_from([64, 128]),
    patterns,
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 1 << 30),
)
def test_equals_reference(layer, shapes, page_size, pattern, dtype, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    expected = attend(Reference(), layer, case.query, case.cache, case.batch, pattern, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmha, "memory_efficient_attention_forward", by_materialized_bias)
        result = compute(case, pattern)
    assert result.dtype == dtype
    error = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, expected, rtol=error, atol=error / 16)


def test_the_double_takes_what_the_real_function_takes():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(by_materialized_bias) == parameters(fmha.memory_efficient_attention_forward)


def test_biases_and_operators():
    """Decodes on their pages, gappy under a window; chunks on gathered keys, local under a window."""

    def parts(window: int | None) -> list[tuple[str, type, int | None]]:
        layer = LayerSpec(0, 4, 2, 16, 16, 0.25, window=window)
        case = make_case(layer, [(200, 1), (150, 30), (90, 1)], 64, dtype=torch.float16)
        plan = Xformers().plan(Kind.of(layer, Full(), case.query, case.cache), case.batch)
        return [
            (type(part.bias).__name__, part.operator, None if part.slots is None else len(part.slots))
            for part in plan
        ]

    triton, flash = fmha.triton_splitk.FwOp, fmha.flash.FwOp
    assert parts(None) == [
        ("PagedBlockDiagonalCausalWithOffsetPaddedKeysMask", triton, None),
        ("BlockDiagonalCausalFromBottomRightMask", flash, 150),
    ]
    assert parts(20) == [
        ("PagedBlockDiagonalCausalWithOffsetGappyKeysMask", triton, None),
        ("BlockDiagonalCausalLocalAttentionFromBottomRightMask", flash, 49),
    ]


def test_few_different_programs_are_compiled():
    """The Triton operator's program depends on the number of sequences and the width of the page table."""
    found = set()
    for count in range(1, 18):
        case = make_case(PLAIN[0], [(40 * count, 1)] * count, 64, dtype=torch.float16)
        (part,) = Xformers().plan(Kind.of(case.layer, Full(), case.query, case.cache), case.batch)
        found.add(part.bias.block_tables.shape)
    assert found == {(1, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16), (32, 16)}


@pytest.mark.parametrize("size", [8, 16, 24, 32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("page_size", [16, 32, 64, 96, 128, 256])
def test_the_adapter_accepts_exactly_what_the_operators_accept(monkeypatch, size, page_size):
    monkeypatch.setattr(adapter, "capability", lambda device: None)
    layer = LayerSpec(0, 4, 2, size, size, 0.1)
    reasons = Xformers().unsupported([layer], GPU, torch.float16, page_size, Full())
    accepted = reasons == ["xformers computes on a CUDA device, not on cuda"]
    case = make_case(layer, [(30, 1), (30, 20)], page_size, dtype=torch.float16)
    monkeypatch.setattr(fmha, "memory_efficient_attention_forward", by_materialized_bias)
    try:
        compute(case, Full())
    except AssertionError:
        assert not accepted
    else:
        assert accepted


def test_all_reasons_at_once(monkeypatch):
    layers = [LayerSpec(0, 4, 2, 80, 40, 0.1, softcap=5.0, sinks=True), PLAIN[1]]
    monkeypatch.setattr(adapter, "is_installed", lambda module: False)
    found = Xformers().unsupported(layers, torch.device("cpu"), torch.float32, 16, Longformer(8, 2))
    assert found == [
        "xformers computes on a CUDA device, not on cpu",
        "xformers computes in float16 or bfloat16, not float32",
        "xformers cannot compute longformer",
        "xformers takes values of the keys' head size only (layer 0)",
        "xformers lacks soft-capping (layer 0)",
        "xformers lacks learned sinks (layer 0)",
        "xformers reads pages of head sizes 16, 32, 64, 128, 256, not 80 (layer 0)",
        "xformers reads pages of a multiple of 64 tokens, not 16; choose page size 64",
        "xformers reads pages through triton, which is not installed; pip install triton",
        "xformers is not installed; pip install 'longspan[xformers]'",
    ]


def test_operators_that_are_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def reasons() -> list[str]:
        return Xformers().unsupported(PLAIN, GPU, torch.bfloat16, 64, Full())

    monkeypatch.setattr(fmha.flash.FwOp, "is_available", lambda: True)
    monkeypatch.setattr(adapter, "is_installed", lambda module: True)
    assert reasons() == []
    monkeypatch.setattr(adapter, "is_installed", lambda module: module != "triton")
    assert reasons() == ["xformers reads pages through triton, which is not installed; pip install triton"]
    monkeypatch.setattr(fmha.flash.FwOp, "is_available", lambda: False)
    monkeypatch.setattr(adapter, "is_installed", lambda module: True)
    assert reasons() == ["xformers finds no flash attention here; see python -m xformers.info"]


def test_the_backend_is_refused_on_a_cpu():
    with pytest.raises(UnsupportedError, match="xformers computes on a CUDA device, not on cpu"):
        resolve("xformers", {}, "auto", PLAIN, "cpu", torch.bfloat16, 64)
