"""The query rows of a step and the ranges that they see, as the CPU kernel takes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from attention.patterns.base import ContentPattern, Pattern
from attention.step import Array, StepBatch
from attention.visible import Visible

# Rows that select at once; bounded, since their ranges may be many.
_SELECTING_ROWS = 64


class Rows(NamedTuple):
    """Query rows and the ranges that they see."""

    rows: torch.Tensor  # [N] of the step's query rows, ascending
    owners: torch.Tensor  # [N]
    ranges: torch.Tensor  # [N, 1 or Hkv, K, 2]


_NOTHING = Rows(*(torch.empty(shape, dtype=torch.long) for shape in ((0,), (0,), (0, 1, 0, 2))))

# Arrays, since for so few numbers calling torch costs more than the computation.


def ruled(visible: Visible, window: int | None, pattern: Pattern, before: Rows | None = None) -> Rows:
    """The rows that do not select by content, in layers with this window of their own.

    Args:
        visible: of the step.
        window: of the layers.
        pattern: of the layers.
        before: the same rows of the step from which this one was advanced.

    Returns:
        The rows; ``before`` itself where only the ranges' ends have moved on.
    """
    if before is not None and pattern.dense and window is None:
        np.add(visible.host.positions, 1, out=before.ranges.numpy()[:, 0, 0, 1])
        return before
    owners = visible.host.owners
    rows, others = np.arange(len(owners)), None
    if isinstance(pattern, ContentPattern):
        found = visible.selecting(pattern)
        if len(found) == len(rows):
            return _NOTHING
        others = np.ones(len(rows), dtype=bool)
        others[found] = False
    ranges = visible.spans(pattern, window)[:, None]
    if others is not None:
        rows, owners, ranges = rows[others], owners[others], ranges[others]
    return Rows(*map(torch.from_numpy, (rows, owners, np.ascontiguousarray(ranges))))


def selecting(visible: Visible, pattern: ContentPattern) -> list[Array]:
    """The rows that select by content, in parts."""
    rows = visible.selecting(pattern)
    return [rows[first : first + _SELECTING_ROWS] for first in range(0, len(rows), _SELECTING_ROWS)]


def given(host: StepBatch) -> torch.Tensor:
    """Which query rows belong to a prompt: bool ``[T]``."""
    return torch.from_numpy(host.positions < host.row_prompt_lens)
