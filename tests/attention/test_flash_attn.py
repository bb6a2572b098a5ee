"""The adapters against functions with the packages' documented behavior, in plain torch.

``gpu_check.py`` beside this file checks them against the packages themselves, on a machine with a GPU.
"""

from __future__ import annotations

import importlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec
from attention.kernels.base import Kind
from attention.kernels.flash_attn import FlashAttn
from attention.kernels.reference import Reference
from attention.kernels.step_plans import StepPlans
from attention.patterns.full import Full
from tests.attention.cases import make_case
from tests.attention.flash_cases import (
    HALVES,
    PLAIN,
    compute,
    equals_reference,
    installed,
    layers,
    patterns,
    seeds,
    shapes,
)


@settings(max_examples=12, deadline=None)
@given(layers(), shapes, st.sampled_from([1, 16, 64]), patterns, HALVES, seeds)
def test_fa3_equals_reference(layer, shapes, page_size, pattern, dtype, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    with installed("fa3"):
        equals_reference(FlashAttn(), case, pattern)


@settings(max_examples=12, deadline=None)
@given(layers(), shapes, st.sampled_from([256, 512]), patterns, HALVES, seeds)
def test_fa2_equals_reference(layer, shapes, page_size, pattern, dtype, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    with installed("fa2"):
        equals_reference(FlashAttn(), case, pattern)


@settings(max_examples=12, deadline=None)
@given(layers(sinks=True), shapes, st.sampled_from([1, 16, 64]), patterns, HALVES, seeds)
def test_fa4_equals_reference(layer, shapes, page_size, pattern, dtype, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    with installed("fa4"):
        equals_reference(FlashAttn(), case, pattern)


def test_a_mixed_batch_is_planned_once_for_all_layers():
    case = make_case(PLAIN[0], [(50, 1), (40, 20)], 256, dtype=torch.float16)
    pattern, plans = Full(), StepPlans(FlashAttn(), case.batch)
    with installed("fa2"):
        kinds = [Kind.of(PLAIN[i], pattern, case.query, case.cache) for i in (0, 3)]
        (one, other) = (plans.of(kind) for kind in kinds)
    assert one is other
    assert [len(part.rows) for part in one.parts] == [1, 20]


def test_a_query_of_more_bits_than_the_cache():
    case = make_case(PLAIN[0], [(40, 1), (30, 12)], 16, dtype=torch.bfloat16)
    case.query = case.query.float()
    with installed("fa3"):
        result = compute(FlashAttn(), case, Full())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, compute(Reference(), case, Full()), rtol=0.03, atol=0.03)


def test_interfaces_in_their_order(monkeypatch):
    """FA3, then FA2, then FA4: the first that can compute the layers."""

    def used(*names: str, page_size: int = 256, layer: LayerSpec = PLAIN[0]) -> str:
        calls = []
        with installed(*names):
            for module in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
                try:
                    package = importlib.import_module(module)
                except ImportError:
                    continue
                for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func"):
                    if (real := getattr(package, name, None)) is not None:

                        def record(*args, module=module, real=real, **kwargs):
                            calls.append(module)
                            return real(*args, **kwargs)

                        setattr(package, name, record)
            case = make_case(layer, [(20, 1)], page_size, dtype=torch.float16)
            compute(FlashAttn(), case, Full())
        (module,) = calls
        return module

    assert used("fa2", "fa3") == "flash_attn_interface"
    assert used("fa2") == "flash_attn"
    assert used("fa4") == "flash_attn.cute"
    sinks = LayerSpec(0, 4, 2, 64, 64, 0.125, sinks=True)
    assert used("fa3", "fa4", layer=sinks) == "flash_attn.cute"
