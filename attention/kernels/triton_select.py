"""What ``topk`` chooses, by programs of our own in Triton; see ``triton_select_code``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, TypeGuard

import torch

from attention.kernels.base import power_of_two
from attention.kernels.triton_plan import COVER_FIELDS
from attention.patterns.base import Pattern
from attention.patterns.topk import TopK
from attention.types import AttentionBatch, LayerCache, LayerSpec

# Programs for each multiprocessor, before a row's pages are not cut any further.
_PROGRAMS = 4

# Pages of a part, at most, so that no row among many takes long: their number is known to the device alone.
_LONGEST_PART = 1024

# Bounds that are kept at once, 128 MiB of them: little beside a cache.
_MOST_BOUNDS = 1 << 24

# What a program looks at together, so that it stays in registers: numbers of digests (of the smallest, and as
# many of the largest), of bounds, of scores.
_DIGEST_NUMBERS = 4096
_BOUNDS = 512
_SCORES = 4096

# Pages and parts that a program looks at together, at most.
_PAGES = 64
_PARTS = 64


def knows(pattern: Pattern) -> TypeGuard[TopK]:
    """Whether a pattern's choice is made here."""
    return type(pattern) is TopK  # what is derived from it may choose otherwise


def select(
    pattern: TopK,
    layer: LayerSpec,
    query: torch.Tensor,
    rows: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    processors: int,
    least: int,
) -> torch.Tensor:
    """What rows see, as ``triton_plan.compact`` has it; the layer's own window is taken off already.

    Nothing is asked of the host, and what is launched depends on shapes alone: a program that finds its row
    to be shorter returns at once.

    Args:
        pattern: which chooses.
        layer: the layer.
        query: ``[T, H, D]``, all of the batch's queries, after RoPE, of any strides.
        rows: int64 ``[N]`` on the device: which of them choose.
        cache: the layer's keys, values and digest.
        batch: the step's work.
        processors: multiprocessors of the device.
        least: number of ranges to make room for, see ``compact``.

    Returns:
        int32 ``[N, Hkv, 2 + 2 * R]``.
    """
    table = batch.page_table.contiguous()
    width = table.shape[1]
    choices = min(pattern.choices(batch.page_size), width)
    ranges = max(least, power_of_two(choices + 2))
    covers = torch.empty(
        len(rows), layer.kv_heads, COVER_FIELDS + 2 * ranges, dtype=torch.int32, device=query.device
    )
    step = max(1, _MOST_BOUNDS // (layer.query_heads * width))
    for some, own in zip(rows.split(step), covers.split(step), strict=True):
        _choose(pattern, layer, query, some, cache, batch, table, choices, processors, own)
    return covers


def _choose(
    pattern: TopK,
    layer: LayerSpec,
    query: torch.Tensor,
    rows: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    table: torch.Tensor,
    choices: int,
    processors: int,
    covers: torch.Tensor,
) -> None:
    """Fills ``covers``; see ``select``."""
    assert cache.digest is not None
    assert cache.digest.is_contiguous()
    width = table.shape[1]
    digest = cache.digest
    if digest.dtype == torch.float8_e4m3fn:
        digest = digest.view(torch.uint8)
    group = layer.query_heads // layer.kv_heads
    block_g, block_d = power_of_two(group), power_of_two(layer.head_size)
    block_p = max(1, min(_PAGES, _DIGEST_NUMBERS // block_d, 2 * _BOUNDS // block_g))
    parts = max(processors * _PROGRAMS // (len(rows) * layer.kv_heads), -(-width // _LONGEST_PART))
    parts = max(1, min(parts, -(-width // block_p)))

    def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(len(rows), *shape, dtype=dtype, device=query.device)

    shared: dict[str, Any] = {
        "rows": rows,
        "positions": batch.positions,
        "scores": numbers(layer.kv_heads, width, dtype=torch.int32),
        "width": width,
        "KV_HEADS": layer.kv_heads,
        "PAGE_SIZE": batch.page_size,
        "SINK_PAGES": pattern.sink_pages,
        "RECENT_PAGES": pattern.recent_pages,
        "CHOICES": choices,
        "WINDOW": layer.window or 0,
    }
    code = _code()
    with torch.cuda.device_of(query):
        if choices > 0 and pattern.most_pages(batch.page_size) < width:
            scored = {name: value for name, value in shared.items() if name != "scores"} | {
                "bounds": numbers(layer.query_heads, width),
                "most": numbers(layer.query_heads, parts),
                "sums": numbers(layer.query_heads, parts),
                "GROUP": group,
                "BLOCK_P": block_p,
                "BLOCK_G": block_g,
            }
            grid = layer.kv_heads, parts, len(rows)
            code.bound[grid](
                **scored,
                query=query,
                query_row_stride=query.stride(0),
                query_head_stride=query.stride(1),
                query_stride=query.stride(2),
                digest=digest,
                table=table,
                owners=batch.owners,
                HEAD_SIZE=layer.head_size,
                SCALE=layer.scale,
                BLOCK_D=block_d,
                num_warps=8,
            )
            code.score[grid](
                **scored,
                scores=shared["scores"],
                BLOCK_N=max(1, _BOUNDS // block_g),
                BLOCK_S=max(1, min(_PARTS, _BOUNDS // block_g)),
                num_warps=4,
            )
        code.choose[(layer.kv_heads, len(rows))](
            **shared, covers=covers, RANGES=(covers.shape[2] - COVER_FIELDS) // 2, BLOCK=_SCORES, num_warps=8
        )


@cache
def _code() -> Any:
    """The programs; importing them needs Triton."""
    return import_module("attention.kernels.triton_select_code")
