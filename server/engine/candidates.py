"""The tokens that a draw on the host can give: at usual temperatures most of a vocabulary have a weight of 0.

A draw goes over all weights some ten times; over a whole vocabulary's that takes as long as a decode step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

# A logit so many temperatures below the largest has a weight of less than e^-28 * 2^40 < 1, which is 0.
_REACH = 28.0

# Rows are padded to a multiple of so many numbers: a function may round those of a vector's rest otherwise.
_MULTIPLE = 64

# Of the vocabulary; with more candidates it is faster to look at all. Every 64th logit tells beforehand.
_MOST = 0.25
_TOLD_BY = 64


class Candidates(NamedTuple):
    """The tokens of each row, in ascending order, padded at the end.

    Attributes:
        logits: float32 ``[B, W]``, -inf in the padding.
        tokens: int64 ``[B, W]``, 0 in the padding.
    """

    logits: torch.Tensor
    tokens: torch.Tensor


def candidates(logits: torch.Tensor, best: torch.Tensor, temperatures: torch.Tensor) -> Candidates | None:
    """All tokens with a weight, and maybe others; ``None`` where these are too many to be worth it.

    Args:
        logits: float32 ``[B, V]`` on the host.
        best: ``[B]``, the largest of each row; a row in which it is not finite may have none.
        temperatures: float32 ``[B]``.
    """
    rows, least = logits.numpy(), (best - _REACH * temperatures).numpy()
    if (rows[:, ::_TOLD_BY] >= least[:, None]).mean(axis=1).max() > _MOST:
        return None
    found = [np.flatnonzero(row >= bound) for row, bound in zip(rows, least, strict=True)]
    most = max(map(len, found))
    if most > _MOST * rows.shape[1]:
        return None
    shape = len(rows), max(1, -(-most // _MULTIPLE)) * _MULTIPLE
    kept, tokens = np.full(shape, -np.inf, dtype=np.float32), np.zeros(shape, dtype=np.int64)
    for i, own in enumerate(found):
        kept[i, : len(own)], tokens[i, : len(own)] = rows[i, own], own
    return Candidates(torch.from_numpy(kept), torch.from_numpy(tokens))
