"""Many needles in one prose context, and a question about each: one prefill carries them all.

Retrieval by key as in RULER's niah_multikey_1 (Hsieh et al. 2024, section 3.1); several questions about one
cached context as in SCBench (Li et al. 2024, section 3); and each needle is said twice, as a pass key is
(Mohtashami and Jaggi: Landmark Attention, 2023, section 4.2). The key is one common word and stands right
before its number, in the needles and where the answer begins. So small models find most of 24 numbers in
4,096 tokens, and a variant that loses some shows it.

Needles are spread evenly over the text, so that every depth is asked for. The questions come in an order of
their own, so that depth and turn do not go together.
"""

from __future__ import annotations

from loadtest.tasks import haystack, words
from loadtest.tasks.request import Draft, Question, Request
from loadtest.tasks.sizing import fit
from loadtest.tasks.types import Sample

MAX_NEEDLES = 24
"""Needles of a context of any length."""

_TOKENS_PER_NEEDLE = 100
_LEAST_NEEDLES = 2
# Seven digits are seven tokens at most; some models put a line end or quotes before them.
_MAX_NEW_TOKENS = 20
_TASK = "Numbers of words are hidden in the text below. Remember them: you will be asked for them."


def needles(request: Request) -> list[Sample]:
    """Samples of one context, a turn each: as many as are asked for and the context has needles."""
    number = min(max(request.length // _TOKENS_PER_NEEDLE, _LEAST_NEEDLES), MAX_NEEDLES)
    draw = request.random("needles")
    keys = draw.sample(words.COMMON, number)
    values = haystack.absent(words.numbers(draw), request.text)
    pairs = [(key, next(values)) for key in keys]
    hidden = [((place + 0.5) / number, _sentence(*pair)) for place, pair in enumerate(pairs)]
    asked = draw.sample(pairs, min(request.turns, number))
    questions = tuple(_question(*pair) for pair in asked)

    def build(items: int) -> Draft:
        context = " ".join(haystack.hide(haystack.prose(request, items), hidden))
        return Draft(f"{_TASK}\n{context}\n", questions)

    return fit(request, build, number, _MAX_NEW_TOKENS)


def _sentence(key: str, value: str) -> str:
    return f"Number of {key}: {key} {value}. Again, {key} {value}."


def _question(key: str, value: str) -> Question:
    return Question(
        f"What is the number of {key} in the text above?\n",
        f"Number of {key}: {key}",
        (value,),
        f" {value}",
        evidence=_sentence(key, value),
    )
