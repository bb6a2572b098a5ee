"""Which query rows of a step see what, as the CPU kernel takes it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from attention.kernels.base import choosing_rows, spans_of
from attention.patterns.base import ContentPattern, Pattern
from attention.types import AttentionBatch

# Rows whose choice is made at once, since their ranges may be many.
_CHOOSING_ROWS = 64


class Rows(NamedTuple):
    """Query rows and what they see."""

    rows: torch.Tensor  # [N] of the batch's query rows, ascending
    owners: torch.Tensor  # [N]
    ranges: torch.Tensor  # [N, 1 or Hkv, K, 2]


_NOTHING = Rows(*(torch.empty(shape, dtype=torch.long) for shape in ((0,), (0,), (0, 1, 0, 2))))


def ruled(batch: AttentionBatch, window: int | None, pattern: Pattern) -> Rows:
    """The rows for which the rule over positions is enough, in layers with this window of their own."""
    rows: Rows = batch.plan(("cpu_paged", window, pattern), lambda: _ruled(batch, window, pattern))
    return rows


def choosing(batch: AttentionBatch, pattern: ContentPattern) -> list[torch.Tensor]:
    """The rows that choose by content, in parts."""
    return [part for part in choosing_rows(batch, pattern).split(_CHOOSING_ROWS) if len(part)]


def _ruled(batch: AttentionBatch, window: int | None, pattern: Pattern) -> Rows:
    # Arrays, since with so few numbers a call of torch's costs more than what it computes.
    owners = batch.host_owners.numpy()
    rows, others = np.arange(len(owners)), None
    if isinstance(pattern, ContentPattern):
        found = choosing_rows(batch, pattern)
        if len(found) == len(rows):
            return _NOTHING
        others = np.ones(len(rows), dtype=bool)
        others[found.numpy()] = False
    ranges = spans_of(batch, pattern, window).numpy()[:, None]
    if others is not None:
        rows, owners, ranges = rows[others], owners[others], ranges[others]
    return Rows(*map(torch.from_numpy, (rows, owners, np.ascontiguousarray(ranges))))


def given(batch: AttentionBatch) -> torch.Tensor:
    """Which query rows belong to a prompt: bool ``[T]``."""

    def find() -> torch.Tensor:
        return torch.from_numpy(batch.host_positions.numpy() < batch.host_prompt_lens.numpy())

    rows: torch.Tensor = batch.plan("given", find)
    return rows
