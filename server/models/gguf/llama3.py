"""The parameters of Llama 3's frequency scaling, from the factors that a GGUF file keeps in their place.

A frequency of wavelength ``w`` is divided by ``factor`` where ``w`` is beyond ``original / low``, by 1 where
it is below ``original / high``, and in between by ``1 / ((1 - s) / factor + s)``, where ``s`` grows linearly
with ``1 / w`` from 0 to 1. Only ``factor`` and the two bounds can be seen in the result.
"""

from __future__ import annotations

import math
from typing import Any

import torch

# Those of published models, and similar ones: tried first, since several numbers can give the same factors.
_ORIGINAL = (8192, 4096, 2048, 16384, 32768, 65536)
_BOUNDS = ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0), (2.0, 4.0))
# Converters compute with float32. Bounds that are fitted must keep closer to what the file says.
_USUAL_TOLERANCE, _FITTED_TOLERANCE, _ROUNDING = 1e-5, 2e-6, 1e-6


def recover_llama3(factors: torch.Tensor, base: float) -> dict[str, Any] | None:
    """Parameters that give these factors.

    Args:
        factors: float32 ``[R / 2]``, from the highest frequency to the lowest.
        base: of the frequencies.

    Returns:
        transformers' rope parameters of type ``llama3``; ``None`` if the factors are of another kind.
    """
    wanted = factors.double()
    count = wanted.numel()
    waves = 2 * math.pi * base ** (torch.arange(count, dtype=torch.float64) / count)
    largest = float(wanted.max())
    if largest <= 1 + _ROUNDING or float(wanted.min()) < 1 - _ROUNDING:
        return None
    for factor in (float(f"{largest:.6g}"), largest):
        usual = [(each, _USUAL_TOLERANCE) for each in _usual()]
        fitted = [(each, _FITTED_TOLERANCE) for each in _fitted(wanted, waves, factor)]
        for (low, high, original), tolerance in usual + fitted:
            if not high > low > 0:
                continue
            found = _factors(waves, factor, low, high, original)
            if bool(((found / wanted - 1).abs() <= tolerance).all()):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    return None


def _usual() -> list[tuple[float, float, int]]:
    return [(low, high, original) for original in _ORIGINAL for low, high in _BOUNDS]


def _fitted(wanted: torch.Tensor, waves: torch.Tensor, factor: float) -> list[tuple[float, float, int]]:
    """Bounds that fit what lies between them, for an original length that makes the lower one 1 or nearly."""
    plain = wanted <= 1 + _ROUNDING
    between = ~plain & (wanted < factor * (1 - _ROUNDING))
    share = (1 / wanted[between] - 1 / factor) / (1 - 1 / factor)
    inverse = 1 / waves[between]
    bounds: list[tuple[float, float]] = []
    if inverse.numel() >= 2:
        slope, offset = (
            torch.linalg.lstsq(torch.stack([inverse, torch.ones_like(inverse)], dim=1), share[:, None])
            .solution.flatten()
            .tolist()
        )
        if slope > 0 > offset:
            bounds.append((-slope / offset, slope / (1 - offset)))
    elif inverse.numel() == 1:
        wave, part = float(waves[between][0]), float(share[0])
        for ratio in (4.0, 2.0, 8.0, 3.0, 16.0, 1.5, 1.1):
            longest = wave * (part * (ratio - 1) + 1)
            bounds.append((longest, longest / ratio))
    elif bool(plain.any()):
        last, first = float(waves[plain].max()), float(waves[~plain].min())
        bounds.append((last ** (1 / 3) * first ** (2 / 3), last ** (2 / 3) * first ** (1 / 3)))
    else:
        shortest = float(waves.min())
        bounds.append((shortest / 2, shortest / 4))
    found = []
    for longest, shortest in bounds:
        original = max(1, round(longest))
        exact = (original / longest, original / shortest)
        found += [(round(exact[0], 3), round(exact[1], 3), original), (*exact, original)]
    return found


def _factors(waves: torch.Tensor, factor: float, low: float, high: float, original: int) -> torch.Tensor:
    share = ((original / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)
