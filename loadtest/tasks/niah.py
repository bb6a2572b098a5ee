"""Needles in a haystack, the eight tasks of RULER (Hsieh et al. 2024, section 3.1 and its configurations).

Keys and values are drawn as there: an adjective and a noun, a number of 7 digits, or a UUID; needles stand at
40 depths. The prompts say the same in other words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from loadtest.tasks import haystack, words
from loadtest.tasks.request import Draft, Question, Request
from loadtest.tasks.sizing import fit
from loadtest.tasks.types import Sample

_MAX_NEW_TOKENS = 128
_KINDS = {"words": ("word", "words"), "numbers": ("number", "numbers"), "uuids": ("UUID", "UUIDs")}


@dataclass(frozen=True, slots=True)
class Needles:
    """The needles of a task, and the question about them.

    Attributes:
        haystack: sentences that repeat, the request's text, or other needles.
        keys: kind of the words that values are asked by.
        values: kind of the values that are asked for.
        number: keys that are hidden.
        per_key: values of each.
        asked: keys asked for at once.
    """

    haystack: Literal["noise", "prose", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    number: int = 1
    per_key: int = 1
    asked: int = 1

    def __call__(self, request: Request) -> list[Sample]:
        """The one question about a context."""
        least = 2 if self.haystack == "prose" else 1
        return fit(request, lambda items: self._draft(request, items), least, _MAX_NEW_TOKENS)

    def _draft(self, request: Request, items: int) -> Draft:
        keys = self._drawn(self.keys, request, "keys")
        values = self._drawn(self.values, request, "values")
        # Keys that are asked come first, so that the depth that goes through all of them is the asked one's.
        hidden = [next(keys) for _ in range(self.number)]
        pairs = [(key, next(values)) for key in hidden for _ in range(self.per_key)]
        places = haystack.depths(request, len(pairs))
        needles = [(depth, self._sentence(*pair)) for depth, pair in zip(places, pairs, strict=True)]
        match self.haystack:
            case "noise":
                hay, joint = haystack.noise(items), "\n"
            case "prose":
                hay, joint = haystack.prose(request, items), " "
            case "needles":
                hay, joint = [self._sentence(next(keys), next(values)) for _ in range(items)], "\n"
        context = joint.join(haystack.hide(hay, needles))
        asked = hidden[: self.asked]
        return Draft(f"{self._task()}\n{context}\n", (self._question(asked, pairs),))

    def _drawn(self, kind: str, request: Request, purpose: str) -> Iterator[str]:
        draw = request.random(purpose)
        match kind:
            case "words":
                drawn = words.compounds(draw)
            case "numbers":
                drawn = words.numbers(draw)
            case _:
                drawn = words.uuids(draw)
        return haystack.absent(drawn, request.text) if self.haystack == "prose" else drawn

    @property
    def _one(self) -> bool:
        return self.asked * self.per_key == 1

    def _sentence(self, key: str, value: str) -> str:
        return f"One special magic {_KINDS[self.values][0]} for {key} is: {value}."

    def _task(self) -> str:
        one, several = _KINDS[self.values]
        if self._one:
            return (
                f"A special magic {one} is hidden in the text below. Remember it: you will be asked for it."
            )
        return (
            f"Several special magic {several} are hidden in the text below. Remember them: you will be "
            "asked for them."
        )

    def _question(self, asked: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Question:
        one, several = _KINDS[self.values]
        answer = tuple(value for key, value in pairs if key in asked)
        if self._one:
            return Question(
                f"What is the special magic {one} for {asked[0]} in the text above?\n",
                f"The special magic {one} for {asked[0]} in the text above is:",
                answer,
                f" {answer[0]}",
                evidence=self._sentence(asked[0], answer[0]),
            )
        named = enumeration(asked)
        return Question(
            f"What are all the special magic {several} for {named} in the text above?\n",
            f"The special magic {several} for {named} in the text above are:",
            answer,
            f" {enumeration(answer)}",
        )


def enumeration(items: Sequence[str]) -> str:
    """``a, b, and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"
