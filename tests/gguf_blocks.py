"""Weights in GGUF's blocks: those that gguf can make, and random bytes around scales where it cannot."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize

# Where a block has its scales, of which random bytes could make anything.
_SCALES_AT = {"IQ4_NL": (0,), "Q2_K": (80, 82), "Q3_K": (-2,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (-2,)}


def blocks(name: str, outputs: int, inputs: int) -> np.ndarray:
    """Random weights in blocks of a type, ``[outputs, bytes]``, or without blocks as they are."""
    kind = gguf.GGMLQuantizationType[name]
    random = np.random.default_rng(0)
    if name not in _SCALES_AT:
        return quantize(0.02 * random.standard_normal((outputs, inputs), dtype=np.float32), kind)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    made = random.integers(0, 256, (outputs * inputs // numbers, size), dtype=np.uint8)
    for place in _SCALES_AT[name]:
        scales = (0.02 * random.standard_normal(len(made))).astype(np.float16)
        made[:, place % size : place % size + 2] = scales.view(np.uint8).reshape(-1, 2)
    return made.reshape(outputs, -1)


def published(name: str, outputs: int = 37, inputs: int = 512) -> torch.Tensor:
    """What a file with such blocks says, in float32, as gguf reads it."""
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(np.array(dequantize(blocks(name, outputs, inputs), kind), np.float32))


def as_published(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Weights after they have been in blocks of a type that gguf can make."""
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
