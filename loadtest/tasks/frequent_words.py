"""Frequent words, of RULER (Hsieh et al. 2024, section 3.3): the three that a coded text has most often.

Invented words of six letters, as often as a zeta distribution with alpha 2 has them by rank; one word for
each 50 tokens of the length. The most frequent is ``...``, which does not count.
"""

from __future__ import annotations

import math
import string

from loadtest.tasks import words
from loadtest.tasks.niah import enumeration
from loadtest.tasks.request import Draft, Question, Request
from loadtest.tasks.sizing import fit
from loadtest.tasks.types import Sample

ASKED = 3
_ALPHA = 2.0
_ZETA = math.pi**2 / 6  # of 2
# So many that the third word asked for is in the text, and more often than the next.
_LEAST_WORDS = math.ceil(2 * _ZETA * (ASKED + 2) ** _ALPHA)
_TOKENS_PER_WORD = 50
_MAX_NEW_TOKENS = 50
_TASK = "Below is a text in code words. Count them: the three most frequent are asked for afterwards."


def fwe(request: Request) -> list[Sample]:
    """The one question about a context."""
    drawn = words.letters(request.random("words"), 6, string.ascii_lowercase)
    vocabulary = [
        "...",
        *(next(drawn) for _ in range(max(request.length // _TOKENS_PER_WORD, ASKED + 2) - 1)),
    ]
    frequent = vocabulary[1 : 1 + ASKED]
    asked = (
        Question(
            "Question: Which three words are the most frequent in the code text above? Leave out the dots.\n",
            "Answer: The three most frequent words in the code text above are:",
            tuple(frequent),
            f" {enumeration(frequent)}",
        ),
    )

    def build(items: int) -> Draft:
        text = [
            word
            for rank, word in enumerate(vocabulary, start=1)
            for _ in range(int(items * rank**-_ALPHA / _ZETA))
        ]
        request.random("order").shuffle(text)
        return Draft(f"{_TASK}\n{' '.join(text)}\n", asked)

    return fit(request, build, _LEAST_WORDS, _MAX_NEW_TOKENS)
