"""Log probabilities of given tokens and of the most likely ones, under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attention.transfer import AsyncCopy
from server.messages import Logprob, PositionLogprob

# Rows taken at once, so that a long prompt needs no second copy of its logits.
_ROWS = 64


class Measured(NamedTuple):
    """Log probabilities and ranks in ``T`` rows: of one token each, and of the ``K`` most likely ones."""

    tokens: torch.Tensor  # int64 [T]
    chosen: torch.Tensor  # float32 [T], the tokens' log probabilities
    ranks: torch.Tensor  # int64 [T]
    top: torch.Tensor  # int64 [T, K], the most likely tokens
    values: torch.Tensor  # float32 [T, K], their log probabilities
    top_ranks: torch.Tensor  # int64 [T, K]


def measure(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> Measured:
    """Looks at each row's token and at its ``k`` most likely ones, without waiting for a device.

    A rank is one more than the number of tokens with a strictly greater logit.

    Args:
        logits: ``[T, V]``, as the model gave them; at least one row.
        tokens: int64 ``[T]``, on the same device.
        k: how many of the most likely tokens to look at; all of them, if there are fewer.
    """
    starts = range(0, len(tokens), _ROWS)
    parts = [_measure(logits[at : at + _ROWS].float(), tokens[at : at + _ROWS], k) for at in starts]
    return Measured(*map(torch.cat, zip(*parts, strict=True)))


def entries(measured: Measured, top: Sequence[int]) -> list[PositionLogprob]:
    """Measured rows, by now on the host; ``top`` is how many of the most likely tokens each row wants."""
    columns = zip(*(column.tolist() for column in measured), top, strict=True)
    return [
        PositionLogprob(
            Logprob(token, logprob, rank),
            [Logprob(*entry) for entry in zip(top_ids[:k], top_logprobs[:k], top_ranks[:k], strict=True)],
        )
        for token, logprob, rank, top_ids, top_logprobs, top_ranks, k in columns
    ]


def prompt_logprobs(measured: AsyncCopy) -> list[PositionLogprob]:
    """Log probabilities of a prompt's tokens, after a wait for them.

    Args:
        measured: of ``measure``, at prompt positions with the prompt's token after each.
    """
    found = Measured(*measured.wait())
    return entries(found, [found.top.shape[1]] * len(found.tokens))


def _measure(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> Measured:
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, tokens.unsqueeze(-1))
    ranks = (logits > chosen).sum(-1) + 1
    values, top = logits.topk(min(k, logits.shape[-1]))
    return Measured(tokens, (chosen - total).squeeze(-1), ranks, top, values - total, _dense_ranks(values))


def _dense_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks ``[T, K]`` of values that are sorted, best first: equals share the best rank among them."""
    places = torch.arange(1, values.shape[-1] + 1, device=values.device).expand(values.shape).clone()
    places[:, 1:].masked_fill_(values[:, 1:] == values[:, :-1], 0)
    return places.cummax(-1).values
