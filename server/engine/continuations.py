"""The tokens that may follow the beams of a search: the likeliest by the sums of log probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attention.transfer import AsyncCopy, to_device
from server.engine.beam_search import Continuation
from server.engine.logprobs import Measured, entries, measure
from server.engine.penalties import SamplerState, adjust
from server.messages import PositionLogprob, Submit


class Found(NamedTuple):
    """The arguments of ``BeamSearch.advance``."""

    likeliest: list[Continuation]
    unending: list[Continuation]


class Queued:
    """Continuations as a device finds them, to be read once.

    Penalties change log probabilities, and what they leave is not made to sum to 1 again: as in transformers'
    ``_beam_search``.

    Args:
        logits: float ``[K, V]`` of ``K`` beams, as they come.
        states: of the beams, which have output the same number of tokens.
        scores: of the beams.
        request: of the search.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        states: Sequence[SamplerState],
        scores: Sequence[float],
        request: Submit,
    ) -> None:
        assert request.beams is not None
        count, position = request.beams.count, states[0].output_length
        self._vocabulary, self._top = logits.shape[-1], request.logprobs
        logits = logits.float()
        own = logits.log_softmax(-1)
        sums = adjust(own, states, [position] * len(states))
        if (token := states[0].forced(position)) is not None:
            certain = torch.full_like(sums, -torch.inf)
            certain[:, token] = own.amax(-1) * 0  # NaN where the logits are
            sums = certain
        sums += to_device(torch.tensor(scores, dtype=torch.float32), sums.device).unsqueeze(-1)
        best = self._best(sums, count)
        # Of those whose token ends no beam, stop strings may end as many as there are beams.
        wanted = count if request.beams.stop is None else 2 * count
        unending = best if wanted == count else self._best(sums, wanted)
        if states[0].stop_token_ids and position >= len(request.forced):
            sums[:, states[0].stops(sums.device)] = -torch.inf
            unending = self._best(sums, wanted)
        measured: Sequence[torch.Tensor] = ()
        if self._top is not None:
            places = torch.cat([best[1], unending[1]])
            rows = logits[places // self._vocabulary]
            measured = measure(rows, places % self._vocabulary, self._top)
        self._copy = AsyncCopy([*best, *unending, *measured])

    def read(self) -> Found | None:
        """Waits for them; ``None`` where logits are NaN. Banned tokens are left out."""
        best, places, of_unending, places_of_unending, *measured = self._copy.wait()
        if best.isnan().any():
            return None
        logprobs: Sequence[PositionLogprob | None] = [None] * (len(best) + len(of_unending))
        if self._top is not None:
            logprobs = entries(Measured(*measured), [self._top] * len(logprobs))
        return Found(
            self._listed(best, places, logprobs[: len(best)]),
            self._listed(of_unending, places_of_unending, logprobs[len(best) :]),
        )

    @staticmethod
    def _best(sums: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores, places = sums.flatten().topk(min(count, sums.numel()))
        return scores, places

    def _listed(
        self, scores: torch.Tensor, places: torch.Tensor, logprobs: Sequence[PositionLogprob | None]
    ) -> list[Continuation]:
        return [
            Continuation(place // self._vocabulary, place % self._vocabulary, score, logprob)
            for score, place, logprob in zip(scores.tolist(), places.tolist(), logprobs, strict=True)
            if score > -math.inf
        ]
