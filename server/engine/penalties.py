"""Changes of a row's logits before sampling: bias, penalties, the ban on early stops."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from attention.transfer import to_device
from server.engine.repeats import TYPE, repeating
from server.messages import Sampling


class SamplerState:
    """The state that sampling a sequence needs beside its logits; kept through preemption.

    Args:
        sampling: how tokens are sampled.
        prompt: the prompt's token ids; read by the repetition penalty only.
        vocabulary_size: number of logits ``V``.
        min_tokens: no stop token is sampled before this many output tokens.
        stop_token_ids: the tokens that end the sequence.
        output: tokens output so far, for a state that is made again.
        forced: tokens that the output begins with, whatever the logits.
        forced_end: an output position, and the token that is forced there.

    Raises:
        ValueError: a biased or forced token is outside the vocabulary, or every token is a stop token while
            ``min_tokens`` forbids them.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocabulary_size: int,
        *,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        output: Sequence[int] = (),
        forced: Sequence[int] = (),
        forced_end: tuple[int, int] | None = None,
    ) -> None:
        last = () if forced_end is None else forced_end[1:]
        for what, tokens in (("logit_bias", sampling.logit_bias), ("forced", (*forced, *last))):
            for token in tokens:
                if not 0 <= token < vocabulary_size:
                    raise ValueError(
                        f"{what} names token {token}; the vocabulary has tokens 0 to {vocabulary_size - 1}"
                    )
        # A tokenizer may name an end-of-sequence token for which the model has no logit.
        stops = sorted({token for token in stop_token_ids if 0 <= token < vocabulary_size})
        if min_tokens > 0 and len(stops) == vocabulary_size:
            raise ValueError("with min_tokens, stop_token_ids must leave at least one token to sample")
        self.sampling = sampling
        self.vocabulary_size = vocabulary_size
        self.min_tokens = min_tokens
        self.stop_token_ids = stops
        self.output_length = len(output)
        self._forced = forced
        self._forced_end = forced_end
        self._prompt = prompt
        self._output = list(output)
        self._tokens: array[int] | None = None
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        self._stops: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self._prompt_seen: torch.Tensor | None = None

    def forced(self, position: int) -> int | None:
        """The token that is forced at this output position; ``None`` where it is to be sampled."""
        if self._forced_end is not None and position == self._forced_end[0]:
            return self._forced_end[1]
        return self._forced[position] if position < len(self._forced) else None

    def bans_stops(self, position: int) -> bool:
        """Whether stop tokens are forbidden at this output position."""
        return position < self.min_tokens and bool(self.stop_token_ids)

    def adjusts(self, position: int) -> bool:
        """Whether the logits at this output position are changed before temperature."""
        sampling = self.sampling
        changed = sampling.penalized or sampling.logit_bias or sampling.no_repeat_ngram
        return bool(changed) or self.bans_stops(position)

    def repeating(self) -> list[int]:
        """Tokens that would end a run of ``no_repeat_ngram`` tokens that prompt and output have already."""
        if self._tokens is None:
            self._tokens = array(TYPE, [*self._prompt, *self._output])
        return repeating(self._tokens, self.sampling.no_repeat_ngram)

    def bias(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The biased tokens (int64 ``[N]``) and their biases (float32 ``[N]``); made on first use."""
        if self._bias is None:
            entries = self.sampling.logit_bias
            tokens = _tensor(list(entries), device)
            bias = to_device(torch.tensor(list(entries.values()), dtype=torch.float32), device)
            self._bias = tokens, bias
        return self._bias

    def stops(self, device: torch.device) -> torch.Tensor:
        """The stop tokens, int64 ``[N]``; made on first use."""
        if self._stops is None:
            self._stops = _tensor(self.stop_token_ids, device)
        return self._stops

    def counts(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """How often the output has each token (int32 ``[V]``), and which the prompt has (bool ``[V]``).

        Made on first use: a sequence that waits, or that has no penalty, takes no memory for them.
        """
        if self._counts is None or self._prompt_seen is None:
            size = self.vocabulary_size
            output = torch.tensor(self._output, dtype=torch.int64)
            self._counts = to_device(torch.bincount(output, minlength=size).int(), device)
            prompt = torch.zeros(size, dtype=torch.bool)
            prompt[torch.tensor(self._prompt, dtype=torch.int64)] = True
            self._prompt_seen = to_device(prompt, device)
        return self._counts, self._prompt_seen

    def record(self, token: int) -> None:
        """Records the sampled token."""
        self.output_length += 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._tokens is not None:
            self._tokens.append(token)
        if self.sampling.no_repeat_ngram or (self._counts is None and self.sampling.penalized):
            self._output.append(token)


def adjust(
    logits: torch.Tensor,
    states: Sequence[SamplerState],
    positions: Sequence[int],
    unrecorded: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Applies bias, then repetition, presence and frequency penalties, then bans of early stops and repeats.

    Args:
        logits: float32 ``[B, V]``; left as it is.
        states: one per row.
        positions: number of tokens that each row's sequence has output.
        unrecorded: the last of these where they are not recorded yet, int64 ``[U]`` on the device; where one
            is negative, the row's result is arbitrary.

    Returns:
        ``logits`` itself where nothing applies, else a changed copy. Never ``+inf``.

    Raises:
        ValueError: a penalty needs tokens that are not recorded.
    """
    rows = [row for row, state in enumerate(states) if state.adjusts(positions[row])]
    if not rows:
        return logits
    unrecorded = unrecorded or [None] * len(states)
    penalized = [row for row in rows if states[row].sampling.penalized]
    for row in rows:
        sampling, further = states[row].sampling, unrecorded[row]
        if not sampling.penalized and not sampling.no_repeat_ngram:
            continue
        # Repeats are looked for among recorded tokens only.
        counted = 0 if further is None or sampling.no_repeat_ngram else len(further)
        known = states[row].output_length + counted
        if known != positions[row]:
            raise ValueError(
                f"a penalty is asked for after {positions[row]} output tokens, and {known} are known"
            )
    logits = logits.clone()
    _add_bias(logits, rows, states)
    _penalize(logits, penalized, states, unrecorded)
    _ban_stops(logits, [row for row in rows if states[row].bans_stops(positions[row])], states)
    for row in rows:
        if states[row].sampling.no_repeat_ngram and (banned := states[row].repeating()):
            logits[row, _tensor(banned, logits.device)] = -torch.inf
    return logits.clamp_(max=torch.finfo(torch.float32).max)


def _add_bias(logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplerState]) -> None:
    biased = [row for row in rows if states[row].sampling.logit_bias]
    if biased:
        tokens, bias = zip(*(states[row].bias(logits.device) for row in biased), strict=True)
        logits[_at(logits, biased, tokens)] += torch.cat(bias)


def _penalize(
    logits: torch.Tensor,
    rows: Sequence[int],
    states: Sequence[SamplerState],
    unrecorded: Sequence[torch.Tensor | None],
) -> None:
    """Repetition (Keskar et al.: CTRL, 2019, section 4.1), then presence and frequency."""
    if not rows:
        return
    device = logits.device
    seen_by = [states[row].counts(device) for row in rows]
    counts = torch.stack([output for output, _ in seen_by])
    further = {i: tokens for i, row in enumerate(rows) if (tokens := unrecorded[row]) is not None}
    if further:
        size = counts.shape[1]
        at = [tokens.clamp(min=0) + i * size for i, tokens in further.items()]
        one = torch.ones((), dtype=counts.dtype, device=device)
        flat = torch.cat(at)
        counts.view(-1).scatter_add_(0, flat, one.expand(len(flat)))  # a token may be there twice
    seen = torch.stack([prompt for _, prompt in seen_by]) | (counts > 0)
    samplings = [states[row].sampling for row in rows]
    numbers = [(s.repetition_penalty, s.presence_penalty, s.frequency_penalty) for s in samplings]
    repetition, presence, frequency = to_device(
        torch.tensor(numbers, dtype=torch.float32), device
    ).T.unsqueeze(-1)
    index = _tensor(rows, device)
    x = logits[index]
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    logits[index] = x - presence * (counts > 0) - frequency * counts


def _ban_stops(logits: torch.Tensor, rows: Sequence[int], states: Sequence[SamplerState]) -> None:
    if rows:
        logits[_at(logits, rows, [states[row].stops(logits.device) for row in rows])] = -torch.inf


def _at(
    logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of these tokens in the logits, some for each row."""
    sizes = torch.tensor([len(of_row) for of_row in tokens])
    index = torch.tensor(rows, dtype=torch.int64).repeat_interleave(sizes)
    return to_device(index, logits.device), torch.cat(list(tokens))


def _tensor(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=torch.int64), device)
