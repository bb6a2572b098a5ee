"""The documented behavior of the flash-attention packages' functions, in plain torch."""

from __future__ import annotations

import torch


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sequence: ``[q, H, D]`` over ``[k, Hkv, D]``; its last query is at the position of its last key."""
    left, right = (None if side is None or side < 0 else side for side in window_size)
    distance = (torch.arange(len(query)) + len(key) - len(query))[:, None] - torch.arange(len(key))
    right = 0 if causal else right
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        visible &= distance <= left
    if right is not None:
        visible &= distance >= -right
    # Tokens that no query sees may be unwritten memory.
    seen = visible.any(dim=0)
    visible, key, value = visible[:, seen], key[seen].float(), value[seen].float()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if sink is not None:
        logits = torch.cat([logits, sink.float()[:, None, None].expand(-1, len(query), 1)], dim=-1)
    weights = logits.softmax(dim=-1)[..., : key.shape[0]].nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def from_pages(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` tokens that a row of a page table says."""
    assert table.dtype == torch.int32
    return pages[table[: -(-length // pages.shape[1])].long()].flatten(0, 1)[:length]


def check_tensors(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """The packages' own checks of heads."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert keys.dtype == values.dtype == query.dtype
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256
    assert query.shape[-2] % keys.shape[-2] == 0


def check_starts(starts: torch.Tensor, longest: int, total: int) -> list[int]:
    """Cumulative lengths as they must be, as host integers."""
    assert starts.dtype == torch.int32
    assert starts.is_contiguous()
    assert int(starts[0]) == 0
    assert int(starts[-1]) == total
    assert int(starts.diff().max()) == longest
    return starts.tolist()


def check_lengths(lengths: torch.Tensor, sequences: int) -> list[int]:
    """Lengths as they must be, as host integers."""
    assert lengths.dtype == torch.int32
    assert lengths.is_contiguous()
    assert lengths.shape == (sequences,)
    return lengths.tolist()
