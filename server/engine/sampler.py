"""Choosing each sequence's next token from its logits, for the whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from attention.transfer import fetch, send
from server.engine.chance import uniforms
from server.engine.logprobs import Measured, entries, measure, prompt_logprobs
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

# What is found instead of a token: the logits have no finite maximum; top-p has to look at more of them.
_NONE, _WIDER = -1, -2


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
    adjusted = adjust(logits, [row.state for row in rows], [row.position for row in rows])
    widths = [*(size for size in _NUCLEUS if size < logits.shape[-1]), logits.shape[-1]]
    # Where looking at what was found is a wait, it is looked at with the tokens.
    attempts = [widths] if logits.device.type == "cpu" else [[width] for width in widths]
    found, logprobs = _sample(logits, adjusted, rows, attempts)
    tokens = [None if token == _NONE else token for token in found]
    for row, token in zip(rows, tokens, strict=True):
        if token is not None:
            row.state.record(token)
    return tokens, logprobs


def _sample(
    logits: torch.Tensor, adjusted: torch.Tensor, rows: Sequence[Row], attempts: Sequence[Sequence[int]]
) -> tuple[list[int], list[PositionLogprob | None]]:
    """The rows' tokens or ``_NONE``, and log probabilities where asked for.

    Top-p looks at so many tokens as the first of ``attempts`` says. The host waits once for all of it, and
    again for the rows whose nucleus has more.
    """
    samplings, positions = [row.state.sampling for row in rows], [row.position for row in rows]
    chosen = _choose(adjusted, samplings, positions, attempts[0])
    asked = {i: row.logprobs for i, row in enumerate(rows) if row.logprobs is not None}
    measured: Sequence[torch.Tensor] = ()
    if asked:
        of_asked = _take(chosen, list(asked)).clamp(min=0)
        measured = measure(_take(logits, list(asked)), of_asked, max(asked.values()))
    on_host, *measured = fetch([chosen, *measured])
    tokens = on_host.tolist()
    logprobs: list[PositionLogprob | None] = [None] * len(rows)
    if asked:
        for i, entry in zip(asked, entries(Measured(*measured), list(asked.values())), strict=True):
            logprobs[i] = None if tokens[i] == _NONE else entry
    wide = [i for i, token in enumerate(tokens) if token == _WIDER]
    if wide:
        again = _sample(_take(logits, wide), _take(adjusted, wide), [rows[i] for i in wide], attempts[1:])
        for i, token, logprob in zip(wide, *again, strict=True):
            tokens[i], logprobs[i] = token, logprob
    return tokens, logprobs


def _choose(
    logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int], widths: Sequence[int]
) -> torch.Tensor:
    """The chosen tokens, int64 ``[B]``, or ``_NONE``, or ``_WIDER``; for ``widths`` see ``_top_p``."""
    drawn = [i for i, sampling in enumerate(samplings) if not sampling.greedy]
    if not drawn:
        return _most_likely(logits)
    numbers = uniforms([samplings[i].seed for i in drawn], [positions[i] for i in drawn])
    tokens = _draw(_take(logits, drawn), [samplings[i] for i in drawn], numbers, widths)
    if len(drawn) == len(samplings):
        return tokens
    greedy = [i for i, sampling in enumerate(samplings) if sampling.greedy]
    chosen = torch.empty(len(samplings), dtype=torch.int64, device=logits.device)
    _put(chosen, greedy, _most_likely(_take(logits, greedy)))
    _put(chosen, drawn, tokens)
    return chosen


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type == "cpu":
        # The same, ten times as fast: torch's does not use vectors there.
        rows = logits.numpy()
        likely = rows.argmax(-1)
        likely[~np.isfinite(rows[np.arange(len(rows)), likely])] = _NONE
        return torch.from_numpy(likely)
    best, tokens = logits.max(-1)
    return tokens.masked_fill_(~best.isfinite(), _NONE)


def _draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], numbers: np.ndarray, widths: Sequence[int]
) -> torch.Tensor:
    """See ``_choose``; by the inverse of the cumulative distribution, in the order of token ids."""
    best = logits.amax(-1, keepdim=True)
    temperature = send(torch.tensor([s.temperature for s in samplings], dtype=torch.float32), logits.device)
    # The most likely token's becomes 0, so that no temperature, however low, can overflow.
    x = (logits - best).div_(temperature.clamp_(min=torch.finfo(torch.float32).tiny).unsqueeze(-1))
    _top_k(x, logits, [s.top_k for s in samplings])
    weights = x.exp_().mul_(_UNIT).to(torch.int64)
    wider = _top_p(weights, [s.top_p for s in samplings], widths)
    _min_p(weights, [s.min_p for s in samplings])
    cumulative = weights.cumsum_(-1)
    total = cumulative[:, -1:]
    target = (send(torch.from_numpy(numbers), logits.device).unsqueeze(-1) * total).to(torch.int64)
    tokens = torch.searchsorted(cumulative, torch.minimum(target, total - 1), right=True)
    return tokens.masked_fill_(wider, _WIDER).masked_fill_(~best.isfinite(), _NONE).squeeze(-1)


def _top_k(x: torch.Tensor, logits: torch.Tensor, k: Sequence[int]) -> None:
    """Bars from ``x`` all but the ``k`` largest logits and those equal to the last of them.

    Judged by the logits, since temperature keeps their order and may round differences away.
    """
    rows = [i for i, count in enumerate(k) if 0 < count < x.shape[-1]]
    if rows:
        limited = _take(logits, rows)
        last = send(torch.tensor([k[i] for i in rows]), x.device).unsqueeze(-1) - 1
        threshold = limited.topk(max(k[i] for i in rows)).values.gather(-1, last)
        _put(x, rows, _take(x, rows).masked_fill(limited < threshold, -torch.inf))


def _top_p(weights: torch.Tensor, p: Sequence[float], widths: Sequence[int]) -> torch.Tensor:
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
        limited = _take(weights, rows)
        shares = send(torch.tensor([p[i] for i in rows], dtype=torch.float64), weights.device)
        wanted = (shares * limited.sum(-1)).ceil_().to(torch.int64).clamp_(min=1).unsqueeze(-1)
        cumulative = (ordered := limited.topk(width).values).cumsum(-1)
        less = cumulative[:, -1:] < wanted
        # Past the end for a row that needs more tokens, or whose logits are NaN.
        enough = torch.searchsorted(cumulative, wanted).clamp_(max=width - 1)
        threshold = ordered.gather(-1, enough).masked_fill_(less, 0)
        _put(weights, rows, limited.masked_fill(limited < threshold, 0))
        if width < widths[-1]:
            rows = [i for i, short in zip(rows, less.squeeze(-1).tolist(), strict=True) if short]
        elif width < weights.shape[-1]:
            _put(wider, rows, less)
    return wider


def _min_p(weights: torch.Tensor, p: Sequence[float]) -> None:
    """Bars tokens less likely than ``p`` times the most likely one, whose weight is ``_UNIT``."""
    if any(p):
        floor = send(torch.tensor(p, dtype=torch.float64), weights.device).unsqueeze(-1) * _UNIT
        weights.masked_fill_(weights < floor.ceil_().to(torch.int64), 0)


def _take(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The given rows; ``x`` itself, uncopied, where they are all."""
    return x if len(rows) == len(x) else x[send(torch.tensor(rows), x.device)]


def _put(x: torch.Tensor, rows: Sequence[int], values: torch.Tensor) -> None:
    x[send(torch.tensor(rows), x.device)] = values
