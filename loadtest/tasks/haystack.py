"""Long texts without the answer, and places in them."""

from __future__ import annotations

import bisect
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from loadtest.tasks.request import Request
from loadtest.texts import sentences

DEPTHS = tuple(round(number * 100 / 39) / 100 for number in range(40))
"""Where RULER hides its needles, as shares of the text (Hsieh et al. 2024, section 3)."""

_LONGEST = 240
_NOISE = (
    "Rain falls on the hills. The river runs to the sea. Birds sing in the old trees. "
    "We walk along the road. Then we turn back home."
)


def noise(lines: int) -> list[str]:
    """The same sentences again and again."""
    return [_NOISE] * lines


def prose(request: Request, pieces: int) -> list[str]:
    """Sentences of the request's text in their order, from a place that depends on the index.

    A text that is too short is repeated, as in RULER. Text without an end of sentence within 240 characters,
    like a table, is cut there.

    Raises:
        ValueError: the text is empty.
    """
    found = _pieces(request.text)
    if not found:
        raise ValueError(f"{request.task} hides its needles in prose, and the text has no words; give one")
    start = request.random("place").randrange(len(found))
    return [found[(start + number) % len(found)] for number in range(pieces)]


@lru_cache(maxsize=4)
def _pieces(text: str) -> tuple[str, ...]:
    return tuple(
        piece
        for sentence in sentences(" ".join(text.split()))
        for piece in textwrap.wrap(sentence, _LONGEST, break_on_hyphens=False)
    )


def depths(request: Request, count: int) -> list[float]:
    """Distinct ones of ``DEPTHS``.

    The first goes through all of them as the index counts up, in an order of its own for each seed, task and
    length: few contexts then cover the depths evenly.
    """
    order = list(DEPTHS)
    replace(request, index=0).random("depths").shuffle(order)
    first = order.pop(request.index % len(order))
    return [first, *request.random("other depths").sample(order, count - 1)]


def hide(items: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """The items with each needle before the item that is nearest to its depth, by characters.

    Needles at one place are in the order in which they are given.
    """
    starts = list(itertools.accumulate((len(item) for item in items), initial=0))

    def nearest(depth: float) -> int:
        after = min(bisect.bisect_left(starts, depth * starts[-1]), len(items))
        return min((after, max(after - 1, 0)), key=lambda place: abs(starts[place] - depth * starts[-1]))

    places = sorted((nearest(depth), number) for number, (depth, _) in enumerate(needles))
    whole: list[str] = []
    taken = 0
    for place, number in places:
        whole += items[taken:place]
        whole.append(needles[number][1])
        taken = place
    return whole + list(items[taken:])


def absent(words: Iterator[str], text: str) -> Iterator[str]:
    """The words that do not occur in the text."""
    return (word for word in words if word not in text)
