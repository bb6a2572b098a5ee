"""How tensors of a GGUF file become the parameters that transformers computes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's sizes, for transforms.

    Attributes:
        heads: query heads.
        kv_heads: heads of keys and values.
        head_size: numbers per head.
        index: which of several parameters of one kind, as the parameter's name says.
    """

    heads: int
    kv_heads: int
    head_size: int
    index: int = 0


Transform = Callable[..., torch.Tensor]
"""From ``Sizes`` and the file's tensors to the parameter."""


def same(sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    """As it is."""
    return tensor


def rotary_query(sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    """Rotary pairs lie side by side in the file, and half a head apart in transformers."""
    return _halves(tensor, sizes.heads)


def rotary_key(sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    """As ``rotary_query``, for keys."""
    return _halves(tensor, sizes.kv_heads)


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    if tensor.shape[0] % (2 * heads):
        return tensor  # the shape is refused where it is compared
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def minus_one(sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    """Norms that add one to their weights have it added already in the file."""
    return tensor - 1


def transposed(sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    """Layers that keep their weights by input."""
    return tensor.transpose(-1, -2)


def side_by_side(sizes: Sizes, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gates of all experts, followed by what they gate."""
    return torch.cat([gate, up], dim=1)


def in_turn(sizes: Sizes, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Outputs of gates and of what they gate, in turn; weights by input."""
    merged = torch.stack([gate, up], dim=2).flatten(1, 2)
    return merged.transpose(1, 2) if merged.dim() == 3 else merged


def by_head(sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values lie one after the other in the file, and head by head in transformers."""
    if tensor.shape[0] != 3 * sizes.heads * sizes.head_size:
        return tensor  # the shape is refused where it is compared
    return tensor.unflatten(0, (3, sizes.heads, -1)).transpose(0, 1).reshape(tensor.shape)


def query_row(sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    """One query head's part of what the file keeps for all."""
    return _row(tensor, sizes.index, sizes.heads)


def key_row(sizes: Sizes, tensor: torch.Tensor) -> torch.Tensor:
    """As ``query_row``, for keys."""
    return _row(tensor, sizes.index, sizes.kv_heads)


def _row(tensor: torch.Tensor, index: int, heads: int) -> torch.Tensor:
    return tensor[index] if tensor.shape[0] == heads else tensor
