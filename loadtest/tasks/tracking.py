"""Variable tracking, of RULER (Hsieh et al. 2024, section 3.2): which variables got a value, through others.

One chain of four hops in sentences that repeat; names have five letters. A worked example comes before, with
names of three letters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from loadtest.tasks import haystack, words
from loadtest.tasks.request import Draft, Question, Request
from loadtest.tasks.sizing import fit
from loadtest.tasks.types import Sample

HOPS = 4
MAX_NEW_TOKENS = 30

_TASK = "The text below assigns values to variables, some through other variables. Keep track of them."
_EXAMPLE_LINES = 5


def vt(request: Request) -> list[Sample]:
    """The one question about a context."""
    return tracked(request, chains=1)


def tracked(request: Request, chains: int) -> list[Sample]:
    """Chains in one context, and a question about each."""
    names = words.letters(request.random("names"), 5)
    values = words.numbers(request.random("values"), 5)
    whole = [([next(names) for _ in range(HOPS + 1)], next(values)) for _ in range(chains)]
    questions = tuple(_question(*chain) for chain in whole)
    example = _example(request.random("example"))

    def build(items: int) -> Draft:
        return Draft(f"{example}\n\n{_text(request.random('places'), items, whole)}", questions)

    return fit(request, build, (HOPS + 1) * chains, MAX_NEW_TOKENS)


def _example(draw: random.Random) -> str:
    names = words.letters(draw, 3)
    chain = [next(names) for _ in range(HOPS + 1)]
    value = next(words.numbers(draw, 5))
    asked = _question(chain, value)
    return (
        f"{_text(draw, _EXAMPLE_LINES, [(chain, value)])}{asked.question}{asked.answer_prefix}{asked.target}"
    )


def _text(draw: random.Random, lines: int, chains: Sequence[tuple[Sequence[str], str]]) -> str:
    """Lines of noise with the assignments of each chain in their order, at random places."""
    needles = []
    for names, value in chains:
        assigned = [value, *(f"VAR {name}" for name in names[:-1])]
        sentences = [f"VAR {name} = {source}" for name, source in zip(names, assigned, strict=True)]
        places = sorted(draw.sample(range(lines), len(sentences)))
        needles += [(place / lines, sentence) for place, sentence in zip(places, sentences, strict=True)]
    joined = "\n".join(haystack.hide(haystack.noise(lines), needles))
    return f"{_TASK}\n{joined}\n"


def _question(names: Sequence[str], value: str) -> Question:
    return Question(
        f"Question: Which variables in the text above have the value {value}, directly or through others?\n",
        f"Answer: {len(names)} variables have the value {value} in the text above, which are:",
        tuple(names),
        f" {' '.join(names)}",
    )
