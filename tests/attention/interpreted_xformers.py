"""xformers' Triton kernel under Triton's interpreter: decodes through the adapter equal Reference.

TRITON_INTERPRET=1 XFORMERS_ENABLE_TRITON=1 python -m tests.attention.interpreted_xformers
"""

from __future__ import annotations

import itertools
import logging
from importlib import import_module

import torch

from attention import LayerSpec
from attention.kernels.reference import Reference
from attention.kernels.xformers import Xformers
from attention.patterns.full import Full
from tests.attention.cases import attend, make_case

logging.getLogger("xformers").setLevel(logging.ERROR)
fmha = import_module("xformers.ops.fmha")


def interpreted(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
) -> torch.Tensor:
    """``memory_efficient_attention_forward`` without its check for a GPU."""
    inputs = fmha.Inputs(query, key, value, attn_bias, p, scale, output_dtype)
    return op.apply(inputs, needs_gradient=False)[0]


def main() -> None:
    fmha.memory_efficient_attention_forward = interpreted
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    count = 0
    for window, (query_heads, kv_heads) in itertools.product((None, 40), ((6, 2), (3, 3))):
        layer = LayerSpec(0, query_heads, kv_heads, 16, 16, 0.25, window=window)
        case = make_case(layer, [(200, 1), (90, 1), (3, 1)], 64, dtype=torch.float16, seed=count)
        arguments = (layer, case.query, case.cache, case.batch, Full(), None)
        result, expected = attend(Xformers(), *arguments), attend(Reference(), *arguments)
        torch.testing.assert_close(result, expected, rtol=0.01, atol=0.002)
        count += 1
    print(f"{count} cases equal Reference")


if __name__ == "__main__":
    main()
