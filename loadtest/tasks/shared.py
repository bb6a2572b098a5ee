"""Several questions about one cached context, one after the other: SCBench's form (Li et al. 2024).

A method that evicts the keys that the first question does not need fails from the second on. Three of its
retrieval tasks (its section 3): key-value, prefix-suffix, and variable tracking. At short lengths fewer
questions are asked than may be, so that most of a context stays unasked.
"""

from __future__ import annotations

import itertools
import math
import string

from loadtest.tasks import haystack, words
from loadtest.tasks.infinite import pair, pairs
from loadtest.tasks.request import Draft, Question, Request
from loadtest.tasks.sizing import fit
from loadtest.tasks.tracking import tracked
from loadtest.tasks.types import Sample

MAX_TURNS = 24
"""Questions about one list or object."""

MAX_CHAINS = 8
"""Chains of variables in one text, each asked for once."""

_ITEMS_PER_TURN = 4
_TOKENS_PER_CHAIN = 400
_STRING_TOKENS = 40
_ENDS, _MIDDLE = 4, 8
# As many beginnings and ends as make each come several times, and yet more pairs of them than strings fit.
_TOKENS_PER_PAIR = 2
_STRINGS_TASK = "Below is a list of strings. You will be asked for one of them by its beginning and end."


def kv(request: Request) -> list[Sample]:
    """Values of several keys in one JSON object, at different depths."""
    some = words.uuids(request.random("some"))
    return pairs(request, haystack.depths(request, _turns(request, pair(next(some), next(some)))))


def vt(request: Request) -> list[Sample]:
    """Several chains of variables in one text."""
    return tracked(request, max(1, min(request.turns, MAX_CHAINS, request.length // _TOKENS_PER_CHAIN)))


def prefix_suffix(request: Request) -> list[Sample]:
    """Several strings of one list; others begin like each, and others end like it, but none does both."""
    some = next(words.letters(request.random("some"), 2 * _ENDS + _MIDDLE, string.ascii_lowercase))
    places = haystack.depths(request, _turns(request, some))
    pool = math.ceil(math.sqrt(request.length / _TOKENS_PER_PAIR))

    def build(items: int) -> Draft:
        ends = words.letters(request.random("ends"), _ENDS, string.ascii_lowercase)
        first, last = ([next(ends) for _ in range(pool)] for _ in range(2))
        both = list(itertools.product(first, last))
        request.random("pairs").shuffle(both)
        middles = words.letters(request.random("middles"), _MIDDLE, string.ascii_lowercase)
        drawn = [begin + next(middles) + end for begin, end in both[: len(places) + items]]
        asked = drawn[: len(places)]
        listed = haystack.hide(drawn[len(places) :], list(zip(places, asked, strict=True)))
        return Draft("\n".join([_STRINGS_TASK, *listed, ""]), tuple(_asked(each) for each in asked))

    return fit(request, build, 2 * len(places), _STRING_TOKENS, most=pool**2 - len(places))


def _turns(request: Request, item: str) -> int:
    """As many questions as leave others to most of the items, given one of them."""
    most = request.length // (_ITEMS_PER_TURN * request.count(item))
    return max(1, min(request.turns, MAX_TURNS, most))


def _asked(wanted: str) -> Question:
    begin, end = wanted[:_ENDS], wanted[-_ENDS:]
    return Question(
        f"Which string in the list above begins with {begin} and ends with {end}?\n",
        f"The string that begins with {begin} and ends with {end} is:",
        (wanted,),
        f" {wanted}",
        evidence=wanted,
    )
