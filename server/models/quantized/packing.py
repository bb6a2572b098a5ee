"""Weights of a linear layer in groups of few bits, as linear.cpp reads them.

A group is 32 neighboring weights of one output. 4 bits: ``scale * code + offset`` with codes 0 to 15, as
GGUF's Q4_1 stores them; 8 bits: ``scale * code`` with codes -128 to 127, as its Q8_0 does. Scales and offsets
have 16 bits, and may be negative. Weights that were published in such groups are therefore packed without
loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from server.models.quantized import native

GROUP = 32
COLUMNS = 16
"""Outputs whose codes lie together."""

Bits = Literal[4, 8]


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight matrix ``[N, K]`` in panels of 16 outputs ``P`` and groups of 32 inputs ``G``, filled up.

    Attributes:
        bits: 4 or 8.
        codes: ``[P, G, S, 16, 4]`` uint8, the inputs of a group in order, four to a step. 8 bits: 8 steps,
            codes plus 128. 4 bits: 4 steps, those of the group's second half in the upper 4 bits.
        scales: ``[P, G, 1, 16]`` float16, and for 4 bits ``[P, G, 2, 16]`` with the offsets.
        exact: these are the very weights.
    """

    bits: Bits
    codes: torch.Tensor
    scales: torch.Tensor
    exact: bool


def pack(weight: torch.Tensor, bits: Bits) -> Packed:
    """The nearest codes for scales that reach each group's extremes.

    Args:
        weight: ``[N, K]``, floats on the CPU.
        bits: 4 or 8.

    Raises:
        ValueError: a group's weights need scales beyond 16 bits, or are not finite.
        NativeError: the operator cannot be compiled here.
    """
    return _pack(weight, bits, exactly=False)


def pack_exactly(weight: torch.Tensor, bits: Bits) -> Packed | None:
    """Codes that stand for the very weights, or ``None`` where a group has none.

    They are found from the numbers alone: each group's scale is searched, and proven weight by weight. GGUF's
    Q4_0 and Q4_1 have them in 4 bits, its Q8_0, Q5_0, Q3_K, IQ4_NL and MXFP4 in 8.

    Args:
        weight: ``[N, K]``, floats on the CPU.
        bits: 4 or 8.

    Raises:
        NativeError: the operator cannot be compiled here.
    """
    packed = _pack(weight, bits, exactly=True)
    return packed if packed.exact else None


def _pack(weight: torch.Tensor, bits: Bits, *, exactly: bool) -> Packed:
    outputs, inputs = weight.shape
    panels, groups = -(-outputs // COLUMNS), -(-inputs // GROUP)
    steps, kinds = (4, 2) if bits == 4 else (8, 1)
    codes = torch.empty(panels, groups, steps, COLUMNS, 4, dtype=torch.uint8)
    scales = torch.empty(panels, groups, kinds, COLUMNS, dtype=torch.float16)
    exact = native.pack(weight.detach().float().contiguous(), bits, codes, scales, exactly=exactly)
    return Packed(bits, codes, scales, exact)


def unpack(packed: Packed, outputs: int, inputs: int) -> torch.Tensor:
    """The weights ``[outputs, inputs]`` that the codes stand for, in float32."""
    codes = packed.codes.permute(0, 3, 1, 2, 4)
    scales = packed.scales.permute(0, 3, 1, 2).float()
    if packed.bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=3)
        blocks = scales[..., :1] * codes.flatten(-2) + scales[..., 1:]
    else:
        blocks = scales * (codes.flatten(-2).float() - 128)
    return blocks.flatten(2).flatten(0, 1)[:outputs, :inputs]
