"""Ranges of visible tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def runs(mask: torch.Tensor) -> torch.Tensor:
    """The ranges ``[..., K, 2]`` in which ``mask`` ``[..., L]`` is true; empty ones last."""
    edges = pad(mask, (1, 0)) != pad(mask, (0, 1))
    nth = edges.cumsum(dim=-1, dtype=torch.int32)
    width = int(nth[..., -1].max())
    found = torch.zeros(*mask.shape[:-1], width + 1, dtype=torch.long, device=mask.device)
    at = torch.arange(edges.shape[-1], device=mask.device).expand_as(edges)
    # Places without an edge are written to an extra last column, which is dropped.
    found.scatter_(-1, (nth.long() - 1).where(edges, width), at)
    return found[..., :width].unflatten(-1, (-1, 2))


def ranges_by_block(
    found: list[tuple[torch.Tensor, torch.Tensor]], rows: int, kv_heads: int, device: torch.device
) -> torch.Tensor:
    """Ranges ``[rows, Hkv, K, 2]`` from those of blocks, each given with its rows."""
    width = max((ranges.shape[-2] for _, ranges in found), default=0)
    whole = torch.zeros(rows, kv_heads, width, 2, dtype=torch.long, device=device)
    for at, ranges in found:
        whole[at] = pad(ranges, (0, 0, 0, width - ranges.shape[-2]))
    return whole
