"""Whether the Triton programs choose what ``topk`` does, tried on the device that is to serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from attention.kernels import triton_digest, triton_select
from attention.kernels.base import spans_within
from attention.kernels.triton_plan import COVER_FIELDS, compact
from attention.patterns.topk import TopK
from attention.types import AttentionBatch, LayerCache, LayerSpec

# What the longest row chooses from: more than a program looks at together.
_PAGES = 5000

# So few different pages make up another row that many score the same.
_DISTINCT = 7


@cache
def refusals(
    pattern: TopK,
    layers: tuple[LayerSpec, ...],
    device: torch.device,
    dtype: torch.dtype,
    page_size: int,
    processors: int,
    least: int,
) -> list[str]:
    """Why the choice can't be left to the programs; nothing if they make ``TopK``'s for layers of each shape.

    This also compiles them, as they will be launched.

    Args:
        pattern: which chooses.
        layers: the layers concerned.
        device: where the cache lives.
        dtype: number format of the cache.
        page_size: tokens per page.
        processors: multiprocessors of the device.
        least: see ``triton_select.select``.

    Returns:
        Sentences without their period, naming the kernel.
    """
    shapes = {
        replace(layer, index=0, value_size=layer.head_size, softcap=None, sinks=False) for layer in layers
    }
    try:
        for layer in shapes:
            if not _same_digests(pattern, layer, device, dtype, page_size):
                return [f"triton finds other numbers for topk's pages on {device} than torch does"]
            if not _same_choice(pattern, layer, device, dtype, page_size, processors, least):
                return [f"triton chooses other pages for topk on {device} than torch does"]
    except Exception as error:  # compilers and drivers fail in many ways
        text = " ".join(str(error).split())
        return [f"triton cannot choose pages for topk on {device}: {type(error).__name__}: {text}"]
    return []


def _same_digests(
    pattern: TopK, layer: LayerSpec, device: torch.device, dtype: torch.dtype, page_size: int
) -> bool:
    """One page is completed, one is not, and one is another's."""
    batch = AttentionBatch.build([0], [2 * page_size - 1], [[2, 1]], page_size, device)
    keys = _numbers((4, page_size, layer.kv_heads, layer.head_size), dtype, device)
    digests = []
    for update in (triton_digest.update, pattern.update):
        digest = torch.zeros(4, 2, layer.kv_heads, layer.head_size, dtype=dtype, device=device)
        update(layer, LayerCache(keys, keys, digest), batch)
        digests.append(digest.float())
    return torch.equal(*digests)


def _same_choice(
    pattern: TopK,
    layer: LayerSpec,
    device: torch.device,
    dtype: torch.dtype,
    page_size: int,
    processors: int,
    least: int,
) -> bool:
    """For a long row, one with many equal pages and one that sees all."""
    most = pattern.most_pages(page_size)
    pages = np.random.default_rng(0).permutation(most + _PAGES) + 1
    owned = [pages.tolist(), np.resize(pages[:_DISTINCT], most + 4 * _DISTINCT).tolist(), [1]]
    digest = _numbers((len(pages) + 1, 2, layer.kv_heads, layer.head_size), dtype, device)
    cache = LayerCache(digest[:1], digest[:1], digest)
    batch = AttentionBatch.build(
        [len(own) * page_size - 1 for own in owned], [1] * 3, owned, page_size, device, prompt_lens=[0] * 3
    )
    query = _numbers((3, layer.query_heads, layer.head_size), torch.float32, device)
    if dtype.itemsize > 1:
        query = query.to(dtype)
    rows = torch.arange(3)
    found = triton_select.select(pattern, layer, query, rows.to(device), cache, batch, processors, least)
    spans = spans_within(pattern.select(layer, query, rows, cache, batch), batch.positions, layer.window)
    return _positions(found) == _positions(compact(spans, 0))


def _numbers(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)


def _positions(covers: torch.Tensor) -> list[list[int]]:
    """What each of the covers ``[N, Hkv, ...]`` holds."""
    result = []
    for cover in covers.flatten(0, 1).cpu().numpy():
        starts, shifts = np.split(cover[COVER_FIELDS:], 2)
        tokens = np.arange(cover[0])
        result.append((tokens + shifts[np.searchsorted(starts, tokens, side="right") - 1]).tolist())
    return result
