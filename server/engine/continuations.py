"""The tokens that may follow the beams of a search: the likeliest by the sums of log probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attention.transfer import AsyncCopy, to_device
from server.engine.beam_search import Continuation
from server.engine.penalties import SamplerState, adjust


class Found(NamedTuple):
    """The arguments of ``BeamSearch.advance``."""

    likeliest: list[Continuation]
    unending: list[Continuation]


class Queued:
    """Continuations as a device finds them, to be read once.

    Args:
        logits: float ``[K, V]`` of ``K`` beams, as they come.
        states: of the beams, which have output the same number of tokens.
        scores: of the beams.
        count: how many continuations to find.
        forced: how many of an output's first tokens are forced, and so don't end it.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        states: Sequence[SamplerState],
        scores: Sequence[float],
        count: int,
        forced: int,
    ) -> None:
        self._vocabulary = logits.shape[-1]
        position = states[0].output_length
        logits = logits.float()
        total = logits.logsumexp(-1, keepdim=True)
        sums = adjust(logits, states, [position] * len(states)) - total
        if (token := states[0].forced(position)) is not None:
            certain = torch.full_like(sums, -torch.inf)
            certain[:, token] = total.squeeze(-1) * 0  # NaN where the logits are
            sums = certain
        sums += to_device(torch.tensor(scores, dtype=torch.float32), sums.device).unsqueeze(-1)
        best = self._best(sums, count)
        unending = best
        if states[0].stop_token_ids and position >= forced:
            sums[:, states[0].stops(sums.device)] = -torch.inf
            unending = self._best(sums, count)
        self._copy = AsyncCopy([*best, *unending])

    def read(self) -> Found | None:
        """Waits for them; ``None`` where logits are NaN. Banned tokens are left out."""
        scores, places, of_unending, places_of_unending = (part.tolist() for part in self._copy.wait())
        if any(map(math.isnan, scores)):
            return None
        return Found(self._listed(scores, places), self._listed(of_unending, places_of_unending))

    @staticmethod
    def _best(sums: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores, places = sums.flatten().topk(min(count, sums.numel()))
        return scores, places

    def _listed(self, scores: list[float], places: list[int]) -> list[Continuation]:
        return [
            Continuation(*divmod(place, self._vocabulary), score)
            for score, place in zip(scores, places, strict=True)
            if score > -math.inf
        ]
