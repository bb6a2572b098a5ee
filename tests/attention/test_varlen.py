"""torch's varlen_attn, through functions with its documented behavior, in plain torch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec
from attention.kernels import varlen
from attention.kernels.base import Kind
from attention.kernels.varlen import Varlen
from attention.patterns.full import Full
from tests.attention.cases import make_case
from tests.attention.doubles import varlen as varlen_doubles
from tests.attention.flash_cases import (
    HALVES,
    PLAIN,
    equals_reference,
    layers,
    patterns,
    seeds,
    shapes,
)


@settings(max_examples=12, deadline=None)
@given(
    layers(softcap=False),
    shapes,
    st.sampled_from([1, 16, 256]),
    patterns,
    HALVES,
    seeds,
    st.sampled_from([varlen_doubles.in_2_11, varlen_doubles.since_2_12]),
)
def test_varlen_equals_reference(layer, shapes, page_size, pattern, dtype, seed, double):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", double)
        equals_reference(Varlen(), case, pattern)


def test_the_double_of_varlen_attn_takes_what_the_real_one_takes():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    real = parameters(torch.nn.attention.varlen.varlen_attn)
    doubles = [parameters(double) for double in (varlen_doubles.in_2_11, varlen_doubles.since_2_12)]
    assert real in doubles


@pytest.mark.parametrize(
    ("page_size", "double", "in_place"),
    [
        (512, varlen_doubles.since_2_12, True),
        (16, varlen_doubles.since_2_12, False),
        (512, varlen_doubles.in_2_11, False),
    ],
)
def test_varlen_gathers_pages_that_cannot_be_read_in_place(monkeypatch, page_size, double, in_place):
    monkeypatch.setattr(varlen, "varlen_attn", double)
    case = make_case(PLAIN[0], [(600, 1), (30, 30)], page_size, dtype=torch.float16)
    plan = Varlen().plan(Kind.of(case.layer, Full(), case.query, case.cache), case.batch)
    assert (plan.slots is None) == in_place


def test_a_window_is_all_that_varlen_gathers(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_doubles.in_2_11)
    layer = LayerSpec(0, 4, 2, 64, 64, 0.125, window=10)
    case = make_case(layer, [(600, 1), (300, 40)], 16, dtype=torch.float16)
    plan = Varlen().plan(Kind.of(case.layer, Full(), case.query, case.cache), case.batch)
    assert len(plan.slots) == 10 + 49
