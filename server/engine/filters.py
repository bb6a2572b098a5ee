"""The filters of sampling: which tokens of each row top-k, top-p and min-p leave, in place.

Weights are integers, in units of 2^-40 of the most likely token's. Their sums are exact in any order, so a
token's fate depends neither on the batch nor on how a device adds up, and one of weight 0 is never drawn. A
vocabulary of 2^22 tokens still leaves room in 63 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attention.transfer import to_device
from server.engine.row import put, take

UNIT = 2.0**40
"""The weight of the most likely token."""


def top_k(x: torch.Tensor, logits: torch.Tensor, k: Sequence[int]) -> None:
    """Bars from ``x`` all but the ``k`` largest logits and those equal to the last of them.

    Judged by the logits, since temperature keeps their order and may round differences away.
    """
    rows = [i for i, count in enumerate(k) if 0 < count < x.shape[-1]]
    if rows:
        limited = take(logits, rows)
        last = to_device(torch.tensor([k[i] for i in rows]), x.device).unsqueeze(-1) - 1
        threshold = limited.topk(max(k[i] for i in rows)).values.gather(-1, last)
        put(x, rows, take(x, rows).masked_fill(limited < threshold, -torch.inf))


def top_p(weights: torch.Tensor, p: Sequence[float], widths: Sequence[int]) -> torch.Tensor:
    """Keeps the most likely tokens that sum to ``p`` and those as likely as the last of them.

    Holtzman et al.: The Curious Case of Neural Text Degeneration, 2020, section 3.1.

    Args:
        weights: int64 ``[B, V]``.
        p: of each row.
        widths: how many of the most likely tokens to look at, and how many then, if these sum to less.

    Returns:
        Bool ``[B, 1]``: the rows whose ``widths[-1]`` most likely tokens sum to less, though they have more.
    """
    wider = torch.zeros(len(weights), 1, dtype=torch.bool, device=weights.device)
    rows = [i for i, share in enumerate(p) if share < 1]
    for width in widths:
        if not rows:
            break
        limited = take(weights, rows)
        shares = to_device(torch.tensor([p[i] for i in rows], dtype=torch.float64), weights.device)
        wanted = (shares * limited.sum(-1)).ceil_().to(torch.int64).clamp_(min=1).unsqueeze(-1)
        cumulative = (ordered := limited.topk(width).values).cumsum(-1)
        less = cumulative[:, -1:] < wanted
        # Past the end for a row that needs more tokens, or whose logits are NaN.
        enough = torch.searchsorted(cumulative, wanted).clamp_(max=width - 1)
        threshold = ordered.gather(-1, enough).masked_fill_(less, 0)
        put(weights, rows, limited.masked_fill(limited < threshold, 0))
        if width < widths[-1]:
            rows = [i for i, short in zip(rows, less.squeeze(-1).tolist(), strict=True) if short]
        elif width < weights.shape[-1]:
            put(wider, rows, less)
    return wider


def min_p(weights: torch.Tensor, p: Sequence[float]) -> None:
    """Bars tokens less likely than ``p`` times the most likely one, whose weight is ``UNIT``."""
    if any(p):
        floor = to_device(torch.tensor(p, dtype=torch.float64), weights.device).unsqueeze(-1) * UNIT
        weights.masked_fill_(weights < floor.ceil_().to(torch.int64), 0)
