"""Memory that is kept from step to step, and the views of it that steps ask for again and again."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Heads(NamedTuple):
    """Memory for attention's queries, keys and values, and views of it."""

    rows: torch.Tensor  # [T, (H + 2 * Hkv) * D]
    queries: torch.Tensor  # [T, H, D]
    keys: torch.Tensor  # [T, Hkv, D]
    values: torch.Tensor  # [T, Hkv, D]


class Workspace:
    """Memory for intermediate results.

    Views are kept too: making one takes longer than finding it, and native code need not be given an
    unchanged address again.
    """

    def __init__(self) -> None:
        self._numbers = torch.empty(0)
        self._attended = torch.empty(0)
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}
        self._heads: dict[tuple[int, ...], Heads] = {}
        self._outputs: dict[tuple[int, ...], torch.Tensor] = {}

    def rows(self, count: int, size: int) -> torch.Tensor:
        """Float32 ``[count, size]``; its former content is lost."""
        key = count, size
        if key not in self._rows:
            if self._numbers.numel() < count * size:
                self._heads.clear()
                self._numbers = torch.empty(count * size)
            self._rows = {key: self._numbers[: count * size].view(count, size)}
        return self._rows[key]

    def attended(self, count: int, heads: int, size: int) -> torch.Tensor:
        """Float32 ``[count, heads, size]``, apart from ``rows``."""
        key = count, heads, size
        if key not in self._outputs:
            if self._attended.numel() < count * heads * size:
                self._attended = torch.empty(count * heads * size)
            self._outputs = {key: self._attended[: count * heads * size].view(count, heads, size)}
        return self._outputs[key]

    def heads(self, count: int, query_heads: int, kv_heads: int, size: int) -> Heads:
        """Rows of heads, as layers of a step ask for them again and again."""
        key = count, query_heads, kv_heads, size
        if key not in self._heads:
            rows = self.rows(count, (query_heads + 2 * kv_heads) * size)
            parts = rows.view(count, -1, size).split([query_heads, kv_heads, kv_heads], 1)
            self._heads = {key: Heads(rows, parts[0], parts[1], parts[2])}
        return self._heads[key]
