"""Many needles in one prose context, and a question about each: one prefill carries them all.

The needle and the question are those of RULER's niah_multikey_1 (Hsieh et al. 2024) with keys of one common
word, which small models tell apart; several questions about one cached context are SCBench's form (Li et al.
2024, section 3). Needles are spread evenly over the text, so that every depth is asked for, and the questions
come in an order of their own, so that depth and turn do not go together.
"""

from __future__ import annotations

from loadtest.tasks import haystack, words
from loadtest.tasks.request import Draft, Question, Request
from loadtest.tasks.sizing import fit
from loadtest.tasks.types import Sample

MAX_NEEDLES = 24
"""Of a context, however long."""

_TOKENS_PER_NEEDLE = 100
_LEAST_NEEDLES = 4
# Seven digits are seven tokens at most; some models put a line end or quotes before them.
_MAX_NEW_TOKENS = 20
_TASK = "Special magic numbers are hidden in the text below. Remember them: you will be asked for them."


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
    return f"One special magic number for {key} is: {value}."


def _question(key: str, value: str) -> Question:
    return Question(
        f"What is the special magic number for {key} in the text above?\n",
        f"The special magic number for {key} in the text above is:",
        (value,),
        f" {value}",
        evidence=_sentence(key, value),
    )
