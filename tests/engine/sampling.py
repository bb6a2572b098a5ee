"""Logits, states and draws for the tests of sampling, and what transformers makes of them."""

from __future__ import annotations

import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import sampler
from server.engine.penalties import SamplerState
from server.engine.row import Row
from server.messages import PositionLogprob, Sampling

VOCABULARY = 49152


def logits_of(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def state_of(vocabulary: int, prompt: list[int] | None = None, **kwargs) -> SamplerState:
    own = ("min_tokens", "stop_token_ids", "output", "forced")
    extra = {key: kwargs.pop(key) for key in own if key in kwargs}
    return SamplerState(Sampling(**kwargs), prompt or [0], vocabulary, **extra)


def sample(logits: torch.Tensor, rows: list[Row]) -> tuple[list[int | None], list[PositionLogprob | None]]:
    """Tokens and log probabilities, sampled and read at once."""
    found = sampler.read(sampler.sample(logits, rows))
    logprobs = [of_row[0] if of_row else None for of_row in found.logprobs]
    return [token for (token,) in found.tokens], logprobs


def draw(logits: torch.Tensor, seeds: range, **kwargs) -> list[int]:
    """One draw per seed from one row of logits, in a batch."""
    rows = [Row(state_of(logits.shape[-1], seed=seed, **kwargs), 0) for seed in seeds]
    return sample(logits.expand(len(rows), -1), rows)[0]


def reference(logits: torch.Tensor, **kwargs) -> torch.Tensor:
    """Probabilities ``[V]`` by transformers' processors, in the same order."""
    scores = TemperatureLogitsWarper(kwargs.get("temperature", 1.0))(None, logits.unsqueeze(0))
    if kwargs.get("top_k", 0):
        scores = TopKLogitsWarper(kwargs["top_k"])(None, scores)
    if kwargs.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(kwargs["top_p"])(None, scores)
    if kwargs.get("min_p", 0.0) > 0:
        scores = MinPLogitsWarper(kwargs["min_p"])(None, scores)
    return scores[0].double().softmax(-1)
