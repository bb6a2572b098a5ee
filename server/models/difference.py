"""How far two computations of the same logits differ, and how far a cache may make them differ."""

from __future__ import annotations

import torch

# Positions that are compared at once: as float64 their logits take memory.
_ROWS = 64

# Shares of the logits' standard deviation; 0.004, 0.03 and 0.2 were measured.
_CACHE_TOLERANCE = {torch.float32: 0.0, torch.float16: 0.015, torch.bfloat16: 0.08, torch.float8_e4m3fn: 0.5}


def cache_tolerance(dtype: torch.dtype, kv_dtype: torch.dtype) -> float:
    """The relative error that a KV cache may add by rounding: 0 in the model's own dtype.

    Args:
        dtype: the model's.
        kv_dtype: of keys and values in the cache.
    """
    return 0.0 if kv_dtype == dtype else _CACHE_TOLERANCE[kv_dtype]


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
