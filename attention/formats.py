"""The dtypes that keys and values are kept in."""

from __future__ import annotations

import torch

# By name, as settings and sentences have it. float8_e4m3 is that of the Open Compute Project's 8-bit Floating
# Point Specification, 2023, which has no infinities.
CACHE_FORMATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
}

# The largest number that is rounded to one of float8_e4m3, 448: halfway to what would come next.
_LARGEST_ROUNDED = 464.0


def format_name(dtype: torch.dtype) -> str:
    """What a dtype is called in settings, sentences and metrics, like ``float8_e4m3``."""
    return str(dtype).removeprefix("torch.").removesuffix("fn")


def cast(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers in another format, rounded to nearest even, and NaN where that has no finite one for them.

    An infinite key can hide: where a query's number is negative, the product is minus infinity and the token
    gets no weight. So can the largest number. NaN shows in the logits of every query that sees it.
    """
    if not narrows(numbers.dtype, dtype):
        return numbers.to(dtype)
    if dtype == torch.float8_e4m3fn:
        # Some versions of torch make the largest number of what is too large, others NaN.
        return numbers.where(numbers.abs() <= _LARGEST_ROUNDED, torch.nan).to(dtype)
    result = numbers.to(dtype)
    return result.sub_(result - result)  # infinity less itself


def narrows(numbers: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the second format has no place for some finite numbers of the first."""
    return torch.finfo(dtype).max < torch.finfo(numbers).max


def taken(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """``rows[at]``, whatever their dtype; ``at`` is int64 ``[N]``."""
    return _bytes(rows).index_select(0, at).view(rows.dtype)


def put(rows: torch.Tensor, at: torch.Tensor, numbers: torch.Tensor) -> None:
    """``rows[at] = numbers``, in whatever dtype both are; ``at`` is int64 ``[N]``."""
    _bytes(rows)[at] = _bytes(numbers)


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    # torch does not move numbers of 8 bits on every device, but bytes.
    return numbers.view(torch.uint8) if numbers.dtype == torch.float8_e4m3fn else numbers


def wider(numbers: torch.dtype, cached: torch.dtype) -> torch.dtype:
    """The format of two that holds the numbers of both; any other holds those of 8 bits."""
    return numbers if cached == torch.float8_e4m3fn else torch.promote_types(numbers, cached)
