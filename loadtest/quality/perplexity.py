"""How well a served model predicts a text, under the attention that it is served with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loadtest.greedy import GREEDY
from loadtest.quality.types import Perplexity
from longspan import Client


def perplexity(client: Client, ids: Sequence[int], first: int) -> Perplexity:
    """Perplexity of the tokens from ``first`` on, each given all before it as far as the server lets it see.

    Args:
        client: of the server.
        ids: token ids, one prompt.
        first: index of the first token that counts; at least 1, since the first of all has no context.

    Raises:
        ValueError: no token is left to count.
        LongspanError: the server cannot take the prompt.
    """
    if not 1 <= first < len(ids):
        raise ValueError(f"tokens from {first} on are to count, but there are {len(ids)}")
    # A stream gives the log probabilities in parts, so that no message grows with the prompt.
    with client.stream(ids, max_tokens=1, prompt_logprobs=0, **GREEDY) as stream:
        for _ in stream:
            pass
    logprobs = [position.chosen.logprob for position in stream.prompt_logprobs[first - 1 :]]
    return Perplexity(first, len(logprobs), math.exp(-math.fsum(logprobs) / len(logprobs)))


def pooled(parts: Sequence[Perplexity]) -> Perplexity:
    """Perplexity over several texts, every token weighing the same.

    Args:
        parts: one of each text, all counted from the same token on.
    """
    count = sum(part.count for part in parts)
    mean = math.fsum(part.count * math.log(part.value) for part in parts) / count
    return Perplexity(parts[0].first, count, math.exp(mean))
