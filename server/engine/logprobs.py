"""Log probabilities of chosen tokens and of the most likely ones, under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.types import Logprob, PositionLogprob

# Rows taken at once, so that a long prompt needs no second copy of its logits.
_ROWS = 64


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: Sequence[int]) -> list[PositionLogprob]:
    """Each row's log probability and rank of its token, and its most likely tokens.

    A rank is one more than the number of tokens with a strictly greater logit.

    Args:
        logits: ``[T, V]``, as the model gave them.
        tokens: int64 ``[T]``, on the same device.
        top: for each row, how many of the most likely tokens to give, best first.
    """
    positions: list[PositionLogprob] = []
    for start in range(0, len(top), _ROWS):
        rows = slice(start, start + _ROWS)
        positions += _logprobs(logits[rows].float(), tokens[rows], top[rows])
    return positions


def prompt_logprobs(logits: torch.Tensor, targets: torch.Tensor, k: int) -> list[PositionLogprob]:
    """What a prompt's logits said about the tokens that follow in it.

    Args:
        logits: ``[T, V]`` of ``T`` prompt positions.
        targets: int64 ``[T]``: the prompt's token after each.
        k: how many of the most likely tokens to give, best first.
    """
    return logprobs(logits, targets, [k] * len(targets))


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: Sequence[int]) -> list[PositionLogprob]:
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, tokens.unsqueeze(-1))
    ranks = (logits > chosen).sum(-1) + 1
    values, ids = logits.topk(min(max(top), logits.shape[-1]))
    chosen_list = (chosen - total).squeeze(-1).tolist()
    columns = zip(
        tokens.tolist(),
        chosen_list,
        ranks.tolist(),
        ids.tolist(),
        (values - total).tolist(),
        _dense_ranks(values).tolist(),
        top,
        strict=True,
    )
    return [
        PositionLogprob(
            Logprob(token, logprob, rank),
            [Logprob(*entry) for entry in zip(top_ids[:k], top_logprobs[:k], top_ranks[:k], strict=True)],
        )
        for token, logprob, rank, top_ids, top_logprobs, top_ranks, k in columns
    ]


def _dense_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks ``[T, K]`` of values that are sorted, best first: equals share the best rank among them."""
    return (values.unsqueeze(-2) > values.unsqueeze(-1)).sum(-1) + 1
