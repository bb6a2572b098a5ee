"""Arguments that several of the ``make`` measurements take."""

from __future__ import annotations

import argparse


def count(word: str) -> int:
    """A number of things, at least one.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number above 0")
    return int(word)
