"""How far two computations of the same logits differ."""

from __future__ import annotations

import torch

# Positions that are compared at once: as float64 their logits take memory.
_ROWS = 64


def relative_error(served: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """How far logits ``[T, V]`` differ at each position, ``[T]``.

    The root mean square over the vocabulary, as a share of the standard deviation of ``plain`` there; what
    is NaN counts as infinite.
    """
    errors = []
    for one, other in zip(served.split(_ROWS), plain.split(_ROWS), strict=True):
        # Squares of large logits would be beyond float32.
        one, other = one.double(), other.double()
        errors.append((one - other).square().mean(-1).sqrt() / other.std(-1).clamp_min(1e-6))
    return torch.cat(errors).nan_to_num(nan=float("inf"))
