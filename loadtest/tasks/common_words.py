"""Common words, of RULER (Hsieh et al. 2024, section 3.3): the ten that come more often than the others.

Common words come 30 times and the others 3 times, below 4,096 tokens 6 times and once. A worked example
comes before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from loadtest.tasks import words
from loadtest.tasks.request import Draft, Question, Request
from loadtest.tasks.sizing import fit
from loadtest.tasks.types import Sample

COMMON = 10
_SHORT = 4096
_MAX_NEW_TOKENS = 120
_TASK = "Below is a numbered list of words. Some are in it more often than the others. Remember which."


def cwe(request: Request) -> list[Sample]:
    """The one question about a context."""
    short = request.length < _SHORT
    repeats, rare = (6, 1) if short else (30, 3)
    example_words, example_repeats, example_rare = (20, 3, 1) if short else (40, 10, 3)
    drawn = list(words.english())
    request.random("words").shuffle(drawn)
    # The list's words are taken from one end and the example's from the other: none is in both.
    common = drawn[:COMMON]
    example_drawn = drawn[-example_words:]
    shown = _question(example_drawn[:COMMON])
    example = (
        f"{_text(request.random('example'), example_drawn, example_repeats, example_rare)}"
        f"{shown.question}{shown.answer_prefix}{shown.target}"
    )
    asked = (_question(common),)

    def build(items: int) -> Draft:
        return Draft(f"{example}\n\n{_text(request.random('order'), drawn[:items], repeats, rare)}", asked)

    return fit(request, build, COMMON + 1, _MAX_NEW_TOKENS, most=len(drawn) - example_words)


def _text(draw: random.Random, drawn: list[str], repeats: int, rare: int) -> str:
    listed = [*drawn[:COMMON] * repeats, *drawn[COMMON:] * rare]
    draw.shuffle(listed)
    return f"{_TASK}\n{_numbered(listed)}\n"


def _question(common: Sequence[str]) -> Question:
    return Question(
        f"Question: Which {COMMON} words are the most common in the list above?\n",
        f"Answer: The {COMMON} most common words in the list above are:",
        tuple(common),
        f" {_numbered(common)}",
    )


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
