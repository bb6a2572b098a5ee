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


class Plan(NamedTuple):
    """What the layers of a step share."""

    ruled: Rows  # what the rule over positions is enough for
    choosing: list[torch.Tensor]  # the rows that choose by content, in parts


def planned(batch: AttentionBatch, window: int | None, pattern: Pattern) -> Plan:
    """What layers with this window of their own see under a pattern, made once per batch."""
    plan: Plan = batch.plan(("cpu_paged", window, pattern), lambda: _plan(batch, window, pattern))
    return plan


def _plan(batch: AttentionBatch, window: int | None, pattern: Pattern) -> Plan:
    # Arrays, since with so few numbers a call of torch's costs more than what it computes.
    owners, choosing = batch.host_owners.numpy(), []
    rows, ruled = np.arange(len(owners)), None
    if isinstance(pattern, ContentPattern):
        found = choosing_rows(batch, pattern)
        choosing = [part for part in found.split(_CHOOSING_ROWS) if len(part)]
        if len(found) == len(rows):
            return Plan(_NOTHING, choosing)
        ruled = np.ones(len(rows), dtype=bool)
        ruled[found.numpy()] = False
    ranges = spans_of(batch, pattern, window).numpy()[:, None]
    if ruled is not None:
        rows, owners, ranges = rows[ruled], owners[ruled], ranges[ruled]
    return Plan(Rows(*map(torch.from_numpy, (rows, owners, np.ascontiguousarray(ranges)))), choosing)


def given(batch: AttentionBatch) -> torch.Tensor:
    """Which query rows belong to a prompt: bool ``[T]``."""

    def find() -> torch.Tensor:
        return torch.from_numpy(batch.host_positions.numpy() < batch.host_prompt_lens.numpy())

    rows: torch.Tensor = batch.plan("given", find)
    return rows
