"""xformers' Triton kernel under Triton's interpreter: decodes through the adapter equal Reference.

Triton decides for it at its first import, so ``test_triton`` runs this file in a process of its own.
"""

from __future__ import annotations

import logging

import pytest
import torch

from attention import LayerSpec
from attention.kernels.reference import Reference
from attention.kernels.xformers import Xformers
from attention.patterns.full import Full
from tests.attention.cases import attend, make_case
from tests.interpreter import replace_language_once

logging.getLogger("xformers").setLevel(logging.ERROR)
fmha = pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed")
torch.set_num_threads(1)
replace_language_once()


def interpreted(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
) -> torch.Tensor:
    """``memory_efficient_attention_forward`` without its check for a GPU."""
    inputs = fmha.Inputs(query, key, value, attn_bias, p, scale, output_dtype)
    return op.apply(inputs, needs_gradient=False)[0]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(6, 2), (3, 3)])
def test_its_triton_kernel_equals_reference(query_heads, kv_heads, window, monkeypatch):
    monkeypatch.setattr(fmha, "memory_efficient_attention_forward", interpreted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    layer = LayerSpec(0, query_heads, kv_heads, 16, 16, 0.25, window=window)
    case = make_case(layer, [(200, 1), (90, 1), (3, 1)], 64, dtype=torch.float16)
    arguments = (layer, case.query, case.cache, case.batch, Full(), None)
    result, expected = attend(Xformers(), *arguments), attend(Reference(), *arguments)
    torch.testing.assert_close(result, expected, rtol=0.01, atol=0.002)
