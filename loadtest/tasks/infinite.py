"""Pass key and key-value retrieval, of InfiniteBench (Zhang et al. 2024, section 3), at any length."""

from __future__ import annotations

import json
from collections.abc import Sequence

from loadtest.tasks import haystack, words
from loadtest.tasks.request import Draft, Question, Request
from loadtest.tasks.sizing import fit
from loadtest.tasks.types import Sample

_PASSKEY_TOKENS = 26
_KV_TOKENS = 70
_PASSKEY_TASK = "Something important is hidden in a lot of text that says nothing. Find it and remember it."
_KV_TASK = "Below is a JSON object. You will be asked for the value of a key."


def passkey(request: Request) -> list[Sample]:
    """The one question about a context: five digits, said twice among sentences that repeat."""
    key = next(words.numbers(request.random("key"), 5))
    sentence = f"The pass key is {key}. Remember it. {key} is the pass key."
    asked = Question(
        "What is the pass key in the text above?\n",
        "The pass key is",
        (key,),
        f" {key}",
        evidence=sentence,
    )
    depth = haystack.depths(request, 1)[0]

    def build(items: int) -> Draft:
        lines = haystack.hide(haystack.noise(items), [(depth, sentence)])
        return Draft("\n".join([_PASSKEY_TASK, *lines, ""]), (asked,))

    return fit(request, build, 1, _PASSKEY_TOKENS)


def kv_retrieval(request: Request) -> list[Sample]:
    """The one question about a context: the value of a key in a JSON object of UUID pairs."""
    return pairs(request, haystack.depths(request, 1))


def pairs(request: Request, places: Sequence[float]) -> list[Sample]:
    """Samples of one JSON object of UUID pairs, one for each depth."""

    def build(items: int) -> Draft:
        drawn = words.uuids(request.random("pairs"))
        asked = [(next(drawn), next(drawn)) for _ in places]
        others = [(next(drawn), next(drawn)) for _ in range(items)]
        hidden = [(depth, pair(*each)) for depth, each in zip(places, asked, strict=True)]
        listed = haystack.hide([pair(*each) for each in others], hidden)
        return Draft(f"{_KV_TASK}\n{{{', '.join(listed)}}}\n", tuple(_asked(*each) for each in asked))

    return fit(request, build, 2 * len(places), _KV_TOKENS)


def pair(key: str, value: str) -> str:
    """A pair as JSON writes it."""
    return f"{json.dumps(key)}: {json.dumps(value)}"


def _asked(key: str, value: str) -> Question:
    return Question(
        f"What is the value of the key {json.dumps(key)} in the JSON object above?\n",
        f"{json.dumps(key)}:",
        (value,),
        f" {json.dumps(value)}",
        evidence=pair(key, value),
    )
