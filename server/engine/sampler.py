"""Choosing each sequence's next token from its logits, for the whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from server.engine.chance import uniforms
from server.engine.logprobs import logprobs, prompt_logprobs
from server.engine.penalties import SamplerState, adjust
from server.engine.types import PositionLogprob, Sampling

__all__ = ["Row", "SamplerState", "prompt_logprobs", "sample"]

# Probabilities become integers, in units of 2^-40 of the most likely token's. Sums of integers are exact in
# any order, so a token's fate can depend neither on the batch nor on how a device adds up, and a token of
# weight 0 is never drawn. A vocabulary of 2^22 tokens still leaves room in 63 bits.
_UNIT = 2.0**40

# How many of the most likely tokens top-p looks at, if fewer did not hold the probability that it asks for.
# Nearly always the first will do; a sort of the whole vocabulary takes some thirty times as long.
_NUCLEUS = (256, 4096)


class Row(NamedTuple):
    """One row of a batch of logits.

    Attributes:
        state: its sequence's.
        position: how many tokens the sequence has output.
        logprobs: ``None`` for none, else how many of the most likely tokens beside the chosen one.
    """

    state: SamplerState
    position: int
    logprobs: int | None = None


def sample(
    logits: torch.Tensor, rows: Sequence[Row]
) -> tuple[list[int | None], list[PositionLogprob | None]]:
    """Chooses one token per row and records it in the row's state.

    Log probabilities are those of ``logits`` as they come. Then apply, in this order: bias, repetition,
    presence and frequency penalties, the ban on early stop tokens, temperature, top-k, top-p, min-p. What is
    left is drawn from by the row's own random number (see ``chance.py``).

    Args:
        logits: ``[B, V]`` of any floating type; left as they are.
        rows: one per row of ``logits``.

    Returns:
        The tokens, and each row's log probabilities where asked for. A row with NaN among its logits, or
        with no finite maximum, gets ``None`` for both, and the others what they would get without it.

    Raises:
        ValueError: a row's position does not follow from the tokens recorded in its state.
    """
    for row in rows:
        if row.position != row.state.output_length:
            raise ValueError(
                f"this is output position {row.position}, and {row.state.output_length} tokens are recorded"
            )
    if not rows:
        return [], []
    logits = logits.float()
    states = [row.state for row in rows]
    positions = [row.position for row in rows]
    chosen = _choose(adjust(logits, states, positions), [state.sampling for state in states], positions)
    tokens = [token if token >= 0 else None for token in chosen.tolist()]
    for state, token in zip(states, tokens, strict=True):
        if token is not None:
            state.record(token)
    return tokens, _logprobs_where_asked(logits, chosen, tokens, rows)


def _logprobs_where_asked(
    logits: torch.Tensor, chosen: torch.Tensor, tokens: Sequence[int | None], rows: Sequence[Row]
) -> list[PositionLogprob | None]:
    result: list[PositionLogprob | None] = [None] * len(rows)
    asked = {
        i: row.logprobs for i, row in enumerate(rows) if row.logprobs is not None and tokens[i] is not None
    }
    if asked:
        index = list(asked)
        for i, entry in zip(
            index, logprobs(_take(logits, index), _take(chosen, index), list(asked.values())), strict=True
        ):
            result[i] = entry
    return result


def _choose(logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
    """The chosen tokens, int64 ``[B]``; -1 for a row without a finite maximum."""
    drawn = [i for i, sampling in enumerate(samplings) if not sampling.greedy]
    if not drawn:
        return _most_likely(logits)
    numbers = uniforms([samplings[i].seed for i in drawn], [positions[i] for i in drawn])
    tokens = _draw(_take(logits, drawn), [samplings[i] for i in drawn], numbers)
    if len(drawn) == len(samplings):
        return tokens
    greedy = [i for i, sampling in enumerate(samplings) if sampling.greedy]
    chosen = torch.empty(len(samplings), dtype=torch.int64, device=logits.device)
    chosen[greedy] = _most_likely(_take(logits, greedy))
    chosen[drawn] = tokens
    return chosen


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    best, tokens = logits.max(-1)
    return tokens.masked_fill_(~best.isfinite(), -1)


def _draw(logits: torch.Tensor, samplings: Sequence[Sampling], numbers: np.ndarray) -> torch.Tensor:
    """Tokens ``[B]`` by the inverse of the cumulative distribution, in the order of token ids."""
    device = logits.device
    best = logits.max(-1, keepdim=True).values
    temperature = torch.tensor([s.temperature for s in samplings], dtype=torch.float32, device=device)
    # The most likely token's becomes 0, so that no temperature, however low, can overflow.
    x = (logits - best).div_(temperature.clamp_(min=torch.finfo(torch.float32).tiny).unsqueeze(-1))
    _top_k(x, logits, [s.top_k for s in samplings])
    weights = x.exp_().mul_(_UNIT).to(torch.int64)
    _top_p(weights, [s.top_p for s in samplings])
    _min_p(weights, [s.min_p for s in samplings])
    cumulative = weights.cumsum_(-1)
    total = cumulative[:, -1:]
    target = (torch.from_numpy(numbers).to(device).unsqueeze(-1) * total).to(torch.int64)
    tokens = torch.searchsorted(cumulative, torch.minimum(target, total - 1), right=True)
    return tokens.masked_fill_(~best.isfinite(), -1).squeeze(-1)


def _top_k(x: torch.Tensor, logits: torch.Tensor, k: Sequence[int]) -> None:
    """Bars from ``x`` all but the ``k`` largest logits and those equal to the last of them.

    Judged by the logits, since temperature keeps their order and may round differences away.
    """
    rows = [i for i, count in enumerate(k) if 0 < count < x.shape[-1]]
    if rows:
        limited = _take(logits, rows)
        last = torch.tensor([k[i] for i in rows], device=x.device).unsqueeze(-1) - 1
        threshold = limited.topk(max(k[i] for i in rows)).values.gather(-1, last)
        _put(x, rows, _take(x, rows).masked_fill(limited < threshold, -torch.inf))


def _top_p(weights: torch.Tensor, p: Sequence[float]) -> None:
    """Keeps the most likely tokens that sum to ``p`` and those as likely as the last of them.

    Holtzman et al.: The Curious Case of Neural Text Degeneration, 2020, section 3.1.
    """
    rows = [i for i, share in enumerate(p) if share < 1]
    for width in (*(size for size in _NUCLEUS if size < weights.shape[-1]), weights.shape[-1]):
        if not rows:
            return
        limited = _take(weights, rows)
        shares = torch.tensor([p[i] for i in rows], dtype=torch.float64, device=weights.device)
        wanted = (shares * limited.sum(-1)).ceil_().to(torch.int64).clamp_(min=1).unsqueeze(-1)
        cumulative = (ordered := limited.topk(width).values).cumsum(-1)
        # Past the end for a row that needs more tokens, or whose logits are NaN.
        enough = torch.searchsorted(cumulative, wanted).clamp_(max=width - 1)
        threshold = ordered.gather(-1, enough)
        threshold[cumulative[:, -1:] < wanted] = 0
        _put(weights, rows, limited.masked_fill(limited < threshold, 0))
        rows = [i for i, short in zip(rows, (threshold == 0).squeeze(-1).tolist(), strict=True) if short]


def _min_p(weights: torch.Tensor, p: Sequence[float]) -> None:
    """Bars tokens less likely than ``p`` times the most likely one, whose weight is ``_UNIT``."""
    if any(p):
        floor = torch.tensor(p, dtype=torch.float64, device=weights.device).unsqueeze(-1) * _UNIT
        weights.masked_fill_(weights < floor.ceil_().to(torch.int64), 0)


def _take(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The given rows; ``x`` itself, uncopied, where they are all."""
    return x if len(rows) == len(x) else x[torch.tensor(rows, device=x.device)]


def _put(x: torch.Tensor, rows: Sequence[int], values: torch.Tensor) -> None:
    x[torch.tensor(rows, device=x.device)] = values
