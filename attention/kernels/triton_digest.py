"""What ``topk`` remembers of complete pages, by a program of our own in Triton."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

from attention.kernels.base import power_of_two
from attention.types import AttentionBatch, LayerCache, LayerSpec

# Numbers and tokens that a program looks at together, at most, so that they stay in registers.
_NUMBERS = 1024
_TOKENS = 16


class _Codes(NamedTuple):
    """The whole numbers that have a format's bits, and the bits of its largest number, infinity included."""

    dtype: torch.dtype
    largest_number: int


_CODES = {
    torch.float32: _Codes(torch.int32, 0x7F800000),
    torch.bfloat16: _Codes(torch.int16, 0x7F80),
    torch.float16: _Codes(torch.int16, 0x7C00),
    torch.float8_e4m3fn: _Codes(torch.int8, 0x7E),
}


def update(layer: LayerSpec, cache: LayerCache, batch: AttentionBatch) -> None:
    """See ``ContentPattern.update``, of ``TopK``.

    Nothing is asked of the host: programs of rows that complete no page return at once.

    Args:
        layer: the layer.
        cache: its keys, with the step's own, and its digests.
        batch: the step's work.
    """
    assert cache.digest is not None
    assert cache.keys.is_contiguous()
    assert cache.digest.is_contiguous()
    codes = _CODES[cache.keys.dtype]
    numbers = layer.kv_heads * layer.head_size
    block = min(_NUMBERS, power_of_two(numbers))
    with torch.cuda.device_of(cache.keys):
        _code().digest_pages[(len(batch.slots), -(-numbers // block))](
            digest=cache.digest.view(codes.dtype),
            keys=cache.keys.view(codes.dtype),
            slots=batch.slots,
            positions=batch.positions,
            NUMBERS=numbers,
            PAGE_SIZE=batch.page_size,
            LARGEST=torch.iinfo(codes.dtype).max,
            LARGEST_NUMBER=codes.largest_number,
            BLOCK_T=min(_TOKENS, power_of_two(batch.page_size)),
            BLOCK=block,
            num_warps=8,
        )


@cache
def _code() -> Any:
    """The program; importing it needs Triton."""
    return import_module("attention.kernels.triton_digest_code")
