"""Sampling of each sequence's next token from its logits, for the whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from attention.transfer import AsyncCopy, to_device
from server.engine.candidates import candidates
from server.engine.chance import uniforms
from server.engine.filters import UNIT, min_p, top_k, top_p
from server.engine.logprobs import Measured, entries, measure
from server.engine.penalties import adjust
from server.engine.row import Row, put, take
from server.messages import PositionLogprob, Sampling

# How many of the most likely tokens top-p looks at, if fewer did not hold the probability that it asks for.
# Nearly always the first will do; sorting the whole vocabulary takes 30 times as long.
_NUCLEUS = (256, 4096)

# Found instead of a token: the logits have no finite maximum; top-p has to look at more of them.
_NONE, _WIDER = -1, -2


class _Unread(NamedTuple):
    """Logits whose tokens may be looked for once more; see ``_queue``."""

    logits: torch.Tensor
    adjusted: torch.Tensor
    widths: Sequence[Sequence[int]]


@dataclass(slots=True)
class Sampled:
    """Tokens as a device samples them, one per row.

    Attributes:
        tokens: int64 ``[B]`` on the device; negative where none is found, or only a second look finds it.
    """

    tokens: torch.Tensor
    _rows: Sequence[Row]
    _copy: AsyncCopy
    _again: _Unread | None


class Found(NamedTuple):
    """The sampled tokens of each row that follows no other, and of the rows after it that count.

    Attributes:
        tokens: the last is ``None`` where the logits have NaN or no finite maximum.
        logprobs: one per token where asked for, but for ``None``.
        late: the rows whose tokens took a second look: ``Sampled.tokens`` does not have them.
    """

    tokens: list[list[int | None]]
    logprobs: list[list[PositionLogprob]]
    late: list[int]


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> Sampled:
    """Queues the sampling of one token per row, without waiting for the device.

    Log probabilities are those of ``logits`` as they come. Then apply, in this order: bias, repetition,
    presence and frequency penalties, the ban on early stop tokens, temperature, top-k, top-p, min-p. The
    row's own random number draws from the rest (see ``chance.py``). A row gets the same token in any batch.
    A row whose token is forced gets that token, if its logits have a finite maximum.

    Args:
        logits: ``[B, V]`` of any floating type; left as they are, and kept until they are read.
        rows: one per row of ``logits``.

    Raises:
        ValueError: a penalty needs tokens that are not known.
    """
    logits = logits.float()
    adjusted = adjust(
        logits, [r.state for r in rows], [r.position for r in rows], [r.unrecorded for r in rows]
    )
    widths = [*(size for size in _NUCLEUS if size < logits.shape[-1]), logits.shape[-1]]
    # Where looking at the result is a wait, it is looked at with the tokens.
    attempts = [widths] if logits.device.type == "cpu" else [[width] for width in widths]
    return _queue(logits, adjusted, rows, attempts)


def found_likely(tokens: torch.Tensor, rows: Sequence[Row]) -> Sampled:
    """The tokens of rows that are plainly greedy, where they were found without the logits.

    Args:
        tokens: int64 ``[B]``; -1 where the logits have no finite maximum.
        rows: one per token.
    """
    return Sampled(tokens, rows, AsyncCopy([tokens]), None)


def read(sampled: Sampled, void: Set[int] = frozenset()) -> Found:
    """Waits for the sampled tokens and records them in the rows' states.

    The host waits once for all of it, and again for rows whose nucleus has more tokens than top-p looked at.

    Args:
        sampled: by ``sample``; to be read once.
        void: rows that are not needed any more; their results are arbitrary.

    Raises:
        ValueError: a row's position does not follow from the tokens recorded in its state.
    """
    found, measured, late = _read(sampled, void)
    tokens: list[list[int | None]] = []
    logprobs: list[list[PositionLogprob]] = []
    counts = False
    for i, row in enumerate(sampled._rows):
        if row.follows is None:
            tokens.append([])
            logprobs.append([])
        counts = row.follows is None or (counts and found[i - 1] == row.follows)
        if not counts:
            continue
        token, logprob, state = found[i], measured[i], row.state
        tokens[-1].append(None if token == _NONE else token)
        if logprob is not None:
            logprobs[-1].append(logprob)
        if token == _NONE or i in void:
            continue
        if row.position != state.output_length:
            raise ValueError(f"output position {row.position}, and {state.output_length} tokens are recorded")
        state.record(token)
    return Found(tokens, logprobs, late)


def _queue(
    logits: torch.Tensor, adjusted: torch.Tensor, rows: Sequence[Row], attempts: Sequence[Sequence[int]]
) -> Sampled:
    """Top-p looks at as many tokens as the first of ``attempts`` says; the others are for second looks."""
    tokens = _force(_sample(adjusted, rows, attempts[0]), rows)
    asked = [i for i, row in enumerate(rows) if row.logprobs is not None]
    measured: Sequence[torch.Tensor] = ()
    if asked:
        of_asked = take(tokens, asked).clamp(min=0)
        most = max(rows[i].logprobs or 0 for i in asked)
        measured = measure(take(logits, asked), of_asked, most)
    uncertain = len(attempts) > 1 and any(row.drawn and row.state.sampling.top_p < 1 for row in rows)
    again = _Unread(logits, adjusted, attempts[1:]) if uncertain else None
    return Sampled(tokens, rows, AsyncCopy([tokens, *measured]), again)


def _read(sampled: Sampled, void: Set[int]) -> tuple[list[int], list[PositionLogprob | None], list[int]]:
    """Tokens or ``_NONE``, log probabilities where asked for, and which rows took a second look."""
    rows = sampled._rows
    on_host, *measured = sampled._copy.wait()
    tokens = on_host.tolist()
    logprobs: list[PositionLogprob | None] = [None] * len(rows)
    if measured:
        asked = {i: row.logprobs for i, row in enumerate(rows) if row.logprobs is not None}
        for i, entry in zip(asked, entries(Measured(*measured), list(asked.values())), strict=True):
            logprobs[i] = None if tokens[i] == _NONE else entry
    if sampled._again is None:
        return tokens, logprobs, []
    late = [i for i, token in enumerate(tokens) if token == _WIDER and i not in void]
    if late:
        logits, adjusted, widths = sampled._again
        again = _queue(take(logits, late), take(adjusted, late), [rows[i] for i in late], widths)
        for i, token, logprob in zip(late, *_read(again, frozenset())[:2], strict=True):
            tokens[i], logprobs[i] = token, logprob
    return tokens, logprobs, late


def _force(tokens: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The tokens with the forced ones in the place of those sampled; on the device, like these."""
    forced = [row.forced for row in rows]
    if all(token is None for token in forced):
        return tokens
    wanted = to_device(torch.tensor([_NONE if token is None else token for token in forced]), tokens.device)
    return torch.where((wanted == _NONE) | (tokens == _NONE), tokens, wanted)


def _sample(logits: torch.Tensor, rows: Sequence[Row], widths: Sequence[int]) -> torch.Tensor:
    """The sampled tokens, int64 ``[B]``, or ``_NONE``, or ``_WIDER``; for ``widths`` see ``top_p``."""
    drawn = [i for i, row in enumerate(rows) if row.drawn]
    if not drawn:
        return _most_likely(logits)
    samplings = [rows[i].state.sampling for i in drawn]
    numbers = uniforms([sampling.seed for sampling in samplings], [rows[i].position for i in drawn])
    tokens = _draw(take(logits, drawn), samplings, numbers, widths)
    if len(drawn) == len(rows):
        return tokens
    others = [i for i, row in enumerate(rows) if not row.drawn]
    sampled = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    put(sampled, others, _most_likely(take(logits, others)))
    put(sampled, drawn, tokens)
    return sampled


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type == "cpu":
        # The same, ten times as fast: torch's does not use vectors there.
        rows = logits.numpy()
        likely = rows.argmax(-1)
        for row, token in enumerate(likely.tolist()):
            if not math.isfinite(rows[row, token]):
                likely[row] = _NONE
        return torch.from_numpy(likely)
    best, tokens = logits.max(-1)
    return tokens.masked_fill_(~best.isfinite(), _NONE)


def _draw(
    logits: torch.Tensor, samplings: Sequence[Sampling], numbers: np.ndarray, widths: Sequence[int]
) -> torch.Tensor:
    """See ``_sample``; by the inverse of the cumulative distribution, in the order of token ids."""
    best = logits.amax(-1, keepdim=True)
    temperature = to_device(
        torch.tensor([s.temperature for s in samplings], dtype=torch.float32), logits.device
    ).clamp_(min=torch.finfo(torch.float32).tiny)
    few = candidates(logits, best.squeeze(-1), temperature) if logits.device.type == "cpu" else None
    if few is not None:
        logits, size = few.logits, few.logits.shape[-1]
        widths = [*(width for width in widths if width < size), size]
    # The most likely token's becomes 0, so that no temperature, however low, can overflow.
    x = (logits - best).div_(temperature.unsqueeze(-1))
    top_k(x, logits, [s.top_k for s in samplings])
    weights = x.exp_().mul_(UNIT).to(torch.int64)
    wider = top_p(weights, [s.top_p for s in samplings], widths)
    min_p(weights, [s.min_p for s in samplings])
    cumulative = weights.cumsum_(-1)
    total = cumulative[:, -1:]
    target = (to_device(torch.from_numpy(numbers), logits.device).unsqueeze(-1) * total).to(torch.int64)
    tokens = torch.searchsorted(cumulative, torch.minimum(target, total - 1), right=True)
    if few is not None:  # past the end in a row without a finite maximum
        tokens = few.tokens.gather(-1, tokens.clamp_(max=size - 1))
    return tokens.masked_fill_(wider, _WIDER).masked_fill_(~best.isfinite(), _NONE).squeeze(-1)
