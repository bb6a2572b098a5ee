"""The tokens that end a model's output, from all places where a checkpoint names them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from server.errors import quoted

log = logging.getLogger("longspan.models")

_MOST_DIGITS = 20


def eos_ids(
    named: Mapping[str, Any], token_id: Callable[[str], int | None], vocabulary_size: int
) -> list[int]:
    """End-of-sequence tokens in ascending order. Entries that name no token are left out, with a warning.

    Args:
        named: by the place that says so, as part of a sentence: a token id, a token, a list of these, or
            nothing (``None`` or -1).
        token_id: the id of a token of the tokenizer, ``None`` if it has none.
        vocabulary_size: number of the model's logits.
    """
    found = {
        id_
        for place, value in named.items()
        for each in _single(value)
        for id_ in _ids(place, each, token_id, vocabulary_size)
    }
    if not found:
        log.warning(
            "no end-of-sequence token of this model is known: its answers end where the request's stop "
            "conditions or the context do; name one as eos_token_id in generation_config.json"
        )
    return sorted(found)


def _single(value: Any) -> Iterator[Any]:
    """The value, or what is in it if it is a list, however deeply."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, list):
            left += reversed(each)
        else:
            yield each


def _ids(
    place: str, value: Any, token_id: Callable[[str], int | None], vocabulary_size: int
) -> Iterator[int]:
    match value:
        case None | -1:
            return
        case bool():
            reason = "is no token id"
        case int():
            if 0 <= value < vocabulary_size:
                yield value
                return
            reason = f"is outside the model's vocabulary, whose ids go from 0 to {vocabulary_size - 1}"
        case str():
            known = token_id(value)
            if known is not None and known < vocabulary_size:
                yield known
                return
            if known is None and value.isdecimal() and len(value) <= _MOST_DIGITS:
                yield from _ids(place, int(value), token_id, vocabulary_size)
                return
            reason = (
                "is no token of its tokenizer"
                if known is None
                else f"has id {known}, which the model does not know"
            )
        case _:
            reason = "is no token id"
    log.warning("%s: the end-of-sequence token %s %s; it is not used", place, quoted(value), reason)
