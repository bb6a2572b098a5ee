"""Sizes of the tiles that Triton programs work on."""

from __future__ import annotations

import torch

from attention.kernels.base import power_of_two
from attention.kernels.triton_device import LARGE_SHARED_MEMORY
from attention.kernels.triton_plan import Tile
from attention.types import LayerSpec


def tiles(layer: LayerSpec, dtype: torch.dtype, shared_memory: int) -> tuple[Tile, Tile]:
    """Tiles for single rows and for chunks, of a size that registers and shared memory hold.

    Args:
        layer: the layer's spec.
        dtype: dtype of products.
        shared_memory: bytes for each multiprocessor.
    """
    group = layer.query_heads // layer.kv_heads
    pairs = min(64, max(16, power_of_two(group)))
    size = padded(max(layer.head_size, layer.value_size))
    if dtype == torch.float32:
        tokens, stages = 32 if size <= 64 else 16, 2 if size <= 256 else 1
        return Tile(min(pairs, 32), tokens, 8, stages, 256, 4), Tile(32, tokens, 8, stages, 1024, 1)
    if size <= 128:
        stages = 3 if size <= 64 or shared_memory >= LARGE_SHARED_MEMORY else 2
        return Tile(pairs, 64, 4, 3, 256, 4), Tile(128, 64, 8, stages, 1024, 1)
    tokens = 32 if size <= 256 else 16
    return Tile(min(pairs, 32), tokens, 4, 2, 256, 4), Tile(64, tokens, 8, 2, 1024, 1)


def padded(size: int) -> int:
    """A head size as programs pad it: a power of two, large enough for a matrix product."""
    return max(16, power_of_two(size))
