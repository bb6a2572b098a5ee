"""Writes keys and values to the paged cache in one launch of a Triton program."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from attention.dtypes import can_overflow
from attention.kernels.base import power_of_two
from attention.types import LayerCache

# Numbers that one program moves: a few for each thread, and enough programs for a step of few rows.
_NUMBERS = 1024


def write(cached: LayerCache, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """``LayerCache.write``, with the same bits; ``key`` and ``value`` have the same dtype.

    Asks nothing of the host, and the launch depends only on shapes and strides.

    Args:
        cached: the layer's cache, on the device.
        slots: int64 ``[T]``.
        key: ``[T, kv_heads, head_size]``, of any strides.
        value: ``[T, kv_heads, value_size]``, likewise.
    """
    assert key.dtype == value.dtype
    keys, values = cached.keys, cached.values
    overflows = can_overflow(key.dtype, keys.dtype)
    if keys.dtype == torch.float8_e4m3fn:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    rows, heads, head_size = key.shape
    value_size = value.shape[2]
    blocks = [power_of_two(size) for size in (head_size, value_size)]
    block_heads = min(power_of_two(heads), max(1, _NUMBERS // max(blocks)))
    with torch.cuda.device_of(keys):
        _code().write[(rows, 2, -(-heads // block_heads))](
            key=key,
            key_row_stride=key.stride(0),
            key_head_stride=key.stride(1),
            key_stride=key.stride(2),
            value=value,
            value_row_stride=value.stride(0),
            value_head_stride=value.stride(1),
            value_stride=value.stride(2),
            slots=slots,
            keys=keys,
            key_slot_stride=keys.stride(1),
            key_page_head_stride=keys.stride(2),
            values=values,
            value_slot_stride=values.stride(1),
            value_page_head_stride=values.stride(2),
            HEADS=heads,
            HEAD_SIZE=head_size,
            VALUE_SIZE=value_size,
            CAN_OVERFLOW=overflows,
            BLOCK_H=block_heads,
            BLOCK_D=blocks[0],
            BLOCK_V=blocks[1],
            num_warps=4,
        )


@cache
def _code() -> Any:
    """The program; importing it needs Triton."""
    return import_module("attention.kernels.triton_write_code")
