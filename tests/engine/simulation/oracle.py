"""The answers of a pretended model: fixed by the request alone, so that every output can be checked."""

from __future__ import annotations

from typing import NamedTuple

from server.messages import FinishReason, Submit

VOCABULARY = 40

DOOMED = 25
"""Of so many requests one gets NaN logits at some token."""


class Answer(NamedTuple):
    """All output of a request that is neither aborted nor lost.

    Attributes:
        tokens: in order.
        finish: how it ends.
        content: a value for each token of prompt and output, which depends on all tokens before it: what a
            cache must hold at its place.
    """

    tokens: list[int]
    finish: FinishReason
    content: list[int]


def sampled(request: Submit, position: int) -> int | None:
    """The token at an output position; ``None`` where the logits are NaN."""
    drawn = hash((request.sampling.seed, position))
    if request.sampling.seed % DOOMED == 0 and position == request.sampling.seed // DOOMED % 7:
        return None
    return drawn % VOCABULARY


def answer(request: Submit, context_length: int) -> Answer:
    """The answer to a request."""
    tokens: list[int] = []
    finish = FinishReason.LENGTH
    most = min(request.max_tokens, context_length - len(request.prompt))
    while len(tokens) < most:
        token = sampled(request, len(tokens))
        if token is None:
            finish = FinishReason.FAILED
            break
        tokens.append(token)
        if len(tokens) > request.min_tokens and token in request.stop_token_ids:
            finish = FinishReason.STOP
            break
    value, content = 0, []
    for token in (*request.prompt, *tokens):
        value = hash((value, token))
        content.append(value)
    return Answer(tokens, finish, content)
