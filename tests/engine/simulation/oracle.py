"""The answers of a pretended model: fixed by the request alone, so that every output can be checked."""

from __future__ import annotations

from typing import NamedTuple

from server.engine.beam_search import BeamSearch, Continuation
from server.engine.continuations import Found
from server.messages import FinishReason, Submit

VOCABULARY = 40

DOOMED = 25
"""Of so many requests one gets NaN logits at some token, or makes the step raise that would find it."""


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
    return None if _fails(request, position) else hash((request.sampling.seed, position)) % VOCABULARY


def _fails(request: Submit, position: int) -> bool:
    seed = request.sampling.seed
    return request.id >= 0 and seed % DOOMED == 0 and position == seed // DOOMED % 7


def raises(request: Submit, position: int) -> bool:
    """Whether a step that would find the token at an output position raises: half of those that fail."""
    return _fails(request, position) and request.sampling.seed // DOOMED // 7 % 2 == 0


def following(search: BeamSearch, request: Submit) -> Found | None:
    """What may follow the beams of a search; ``None`` where the logits are NaN."""
    assert request.beams is not None
    position, count = len(search.running[0].tokens), request.beams.count
    if _fails(request, position):
        return None
    stops = request.stop_token_ids
    before = [hash((request.sampling.seed, *beam.tokens)) for beam in search.running]
    found = [
        Continuation(i, token, beam.score - 0.01 * (hash((before[i], token)) % 997))
        for i, beam in enumerate(search.running)
        for token in range(VOCABULARY)
        if token not in stops or position >= request.min_tokens
    ]
    found.sort(key=lambda one: -one.score)
    return Found(found[:count], [one for one in found if one.token not in stops][:count])


def answers(request: Submit, context_length: int) -> dict[int, Answer]:
    """The answer to a request, by the ids of its outputs."""
    if request.beams is None:
        return {request.id: answer(request, context_length)}
    search = BeamSearch(request)
    while search.running:
        found = following(search, request)
        if found is None:
            return {id_: Answer([], FinishReason.FAILED, []) for id_ in request.ids}
        search.advance(*found)
    best = [*search.finished, *[search.finished[-1]] * len(request.ids)]
    ends = {True: FinishReason.STOP, False: FinishReason.LENGTH}
    return {
        id_: Answer(beam.tokens, ends[beam.tokens[-1] in request.stop_token_ids], [])
        for id_, beam in zip(request.ids, best, strict=False)
    }


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
    return Answer(tokens, finish, content([*request.prompt, *tokens]))


def content(tokens: list[int]) -> list[int]:
    """See ``Answer.content``."""
    value, found = 0, []
    for token in tokens:
        value = hash((value, token))
        found.append(value)
    return found
