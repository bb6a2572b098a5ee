"""Arguments that several measurements take."""

from __future__ import annotations

import argparse
import re

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")

LEAST_BUDGET = 30.0
"""Seconds in which anything can be measured."""


def count(word: str) -> int:
    """A number of things, at least one.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number above 0")
    return int(word)


def duration(words: str) -> float:
    """Seconds from words like ``5m``, ``1h30m``, ``90``; 0 where they say none."""
    match = _DURATION.fullmatch(words.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    return 3600 * hours + 60 * minutes + seconds


def budget(word: str) -> float:
    """Seconds that measuring may take; see ``duration``.

    Raises:
        argparse.ArgumentTypeError: they are too few, or none.
    """
    seconds = duration(word)
    if seconds < LEAST_BUDGET:
        raise argparse.ArgumentTypeError(
            f"{word} is not a duration of at least {LEAST_BUDGET:g} seconds; write it like 90s, 5m or 1h30m"
        )
    return seconds
