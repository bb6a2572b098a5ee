"""The dtypes that keys and values are kept in."""

from __future__ import annotations

import torch

# By name, as settings and sentences have it. float8_e4m3 is that of the Open Compute Project's 8-bit Floating
# Point Specification, 2023, which has no infinities.
CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
}

# The largest number that is rounded to one of float8_e4m3, 448: halfway to the next one if there were more
# exponents.
_LARGEST_ROUNDED = 464.0


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in settings, sentences and metrics, like ``float8_e4m3``."""
    return str(dtype).removeprefix("torch.").removesuffix("fn")


def cast(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers in another dtype, rounded to nearest even, and NaN where they exceed its finite range.

    An infinite key can go unnoticed: where a query's number is negative, the product is minus infinity and
    the token gets no weight. The same holds for the largest finite number. NaN shows in the logits of every
    query that sees it.
    """
    if not can_overflow(numbers.dtype, dtype):
        return numbers.to(dtype)
    if dtype == torch.float8_e4m3fn:
        # For numbers that are too large, some versions of torch give the largest one, others NaN.
        return numbers.where(numbers.abs() <= _LARGEST_ROUNDED, torch.nan).to(dtype)
    result = numbers.to(dtype)
    return result.sub_(result - result)  # infinity minus infinity is NaN


def can_overflow(numbers: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether some finite numbers of the first dtype exceed the finite range of the second."""
    return torch.finfo(dtype).max < torch.finfo(numbers).max


def taken(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """``rows[at]`` for any dtype; ``at`` is int64 ``[N]``."""
    return _bytes(rows).index_select(0, at).view(rows.dtype)


def put(rows: torch.Tensor, at: torch.Tensor, numbers: torch.Tensor) -> None:
    """``rows[at] = numbers`` for any dtype, the same for both; ``at`` is int64 ``[N]``."""
    _bytes(rows)[at] = _bytes(numbers)


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    # On some devices torch can index bytes, but not float8.
    return numbers.view(torch.uint8) if numbers.dtype == torch.float8_e4m3fn else numbers


def wider(numbers: torch.dtype, cached: torch.dtype) -> torch.dtype:
    """The dtype in which to compute with both: the promoted one, or ``numbers`` if the cache is float8."""
    return numbers if cached == torch.float8_e4m3fn else torch.promote_types(numbers, cached)
