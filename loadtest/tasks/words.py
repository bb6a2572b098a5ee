"""Words, numbers and identifiers to hide: drawn, none twice."""

from __future__ import annotations

import importlib
import random
import string
import uuid
from collections.abc import Callable, Iterator
from functools import cache

_COMMON = """
anchor apple arrow basket beach bell bird boat bottle box branch bread bridge brush bucket butter button
cabin cake camera candle carpet castle cat chair cheese cherry circle clock cloud coat coffee coin copper
corn cotton crown cup curtain daisy desk diamond dog door dragon drum eagle engine farm feather fence
finger fire fish flag flower forest fork fox garden gate glass glove gold grape guitar hammer harbor hat
honey horse hotel house ice island jacket kettle king kitchen knife ladder lake lamp leaf lemon lion
market mirror moon mountain mouse nail needle nest ocean onion orange oven paint palace paper pencil
pepper piano pillow pilot planet plate pocket potato prince queen rabbit radio rain ribbon ring river
road rocket roof rope rose sail salt sand school ship shirt shoe silver sister snow soap spoon spring
stone storm sugar summer sun sword table tea tent tiger tomato tower train tree violin wagon wall watch
water wheel window winter wolf wood wool
"""
COMMON = tuple(_COMMON.split())
"""Common nouns, each of which means something else than the others."""


@cache
def _category(name: str) -> tuple[str, ...]:
    """One of the word lists of ``wonderwords``, which RULER draws from as well; without profanities."""
    try:
        wonderwords = importlib.import_module("wonderwords")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "RULER's tasks draw their words from the package wonderwords; install it: "
            "pip install 'longspan[load]'"
        ) from error
    found = wonderwords.RandomWord().filter(include_categories=(name,))
    return tuple(sorted(set(wonderwords.filter_profanity(found))))


@cache
def english() -> tuple[str, ...]:
    """Nouns, adjectives and verbs: about 8,500."""
    return tuple(sorted({*_category("noun"), *_category("adjective"), *_category("verb")}))


def compounds(draw: random.Random) -> Iterator[str]:
    """Keys of an adjective and a noun, like ``old-river``: some six million."""
    adjectives, nouns = _category("adjective"), _category("noun")
    return _new(lambda: f"{draw.choice(adjectives)}-{draw.choice(nouns)}")


def numbers(draw: random.Random, digits: int = 7) -> Iterator[str]:
    """Numbers that don't begin with 0."""
    return _new(lambda: str(draw.randrange(10 ** (digits - 1), 10**digits)))


def uuids(draw: random.Random) -> Iterator[str]:
    """UUIDs of version 4."""
    return _new(lambda: str(uuid.UUID(int=draw.getrandbits(128), version=4)))


def letters(draw: random.Random, length: int, alphabet: str = string.ascii_uppercase) -> Iterator[str]:
    """Invented words."""
    return _new(lambda: "".join(draw.choices(alphabet, k=length)))


def _new(one: Callable[[], str]) -> Iterator[str]:
    given: set[str] = set()
    while True:
        word = one()
        if word not in given:
            given.add(word)
            yield word
