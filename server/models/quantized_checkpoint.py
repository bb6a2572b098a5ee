"""Checkpoints whose weights are published in few bits, in the forms that transformers reads."""

from __future__ import annotations

import re

_INSTEAD = "choose the unquantized checkpoint, or a GGUF file of the model"

# What else quantization leaves in a file beside the weights.
_PARTS = re.compile(
    r"(?:^|[._])(?:(?:weight|input|output|activation)(?:_global)?_scales?(?:_inv|_2)?|scales?|scale_inv|qscale_\w+"
    r"|qweight|qzeros|g_idx|zero_points?|weight_zero_point|weight_packed|weight_shape|absmax|quant_map"
    r"|nested_absmax|nested_quant_map|quant_state\.\w+|SCB|weight_format|blocks|qdata|codebooks|codes|amax)$"
)


def looks_quantized(name: str) -> bool:
    """Whether a tensor's name is one that quantization gives."""
    return bool(_PARTS.search(name))
