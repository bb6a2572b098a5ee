"""Measurements of quality: rows per question and per block of text. Nothing here measures."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """One deployment's answer to one sample. Names are those that kvpress's evaluation writes, where it does.

    Attributes:
        deployment: its name.
        task: of the sample.
        length: of the sample.
        index: of the sample.
        turn: of the sample.
        depth: of the sample.
        answer: what it should contain.
        predicted_answer: what was generated.
        score: 0 to 1; NaN where there is no known answer.
        logprob: natural log probability of the sample's ``target`` after the prompt, every token decoded
            as the deployment decodes; NaN where it was not measured.
        target_tokens: tokens of ``target``.
        prompt_tokens: of the prompt.
        cached_tokens: of those, found in the prefix cache.
        error: why there is no answer; empty if there is.
        seconds: of a question about this context: from the first request to the last answer to any of its
            questions, divided by their number; NaN where it was not measured.
    """

    deployment: str
    task: str
    length: int
    index: int
    turn: int
    depth: float | None
    answer: tuple[str, ...]
    predicted_answer: str = ""
    score: float = math.nan
    logprob: float = math.nan
    target_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    seconds: float = math.nan


@dataclass(frozen=True, slots=True)
class TextBlock:
    """How one deployment decodes a stretch of the user's text that follows ``start`` tokens of it.

    Attributes:
        deployment: its name.
        length: context length that the block belongs to.
        block: its number; blocks of one number are of the same tokens for all deployments.
        start: tokens before it.
        logprobs: natural log probability of each of its tokens.
        kl: KL divergence from full attention's next-token distribution to this one's, nats, mean over
            its tokens: a lower bound, since only the most likely tokens are known and the others are taken
            together; NaN for full attention itself.
        same_top: share of its places with the same most likely token as under full; NaN for full itself.
        error: why there are no figures; empty if there are.
    """

    deployment: str
    length: int
    block: int
    start: int
    logprobs: tuple[float, ...] = ()
    kl: float = math.nan
    same_top: float = math.nan
    error: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """The KV cache of one sequence under a deployment.

    Attributes:
        deployment: its name.
        length: tokens of the sequence.
        bytes: that the sequence holds while it is being continued.
        fits: sequences of that length that a cache of the plan's ``kv_memory`` holds at once.
        error: why there are no figures; empty if there are.
    """

    deployment: str
    length: int
    bytes: float = math.nan
    fits: int = 0
    error: str = ""
