"""Which fault comes when, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable

QUIET = "none"
"""A window without a fault."""

# Engines are ended in the first part of a run only: the last one's memory is to be seen for long.
_WITH_ENGINE_FAULTS = 0.6


def schedule(rng: random.Random, windows: int, of_engines: Iterable[str], others: Iterable[str]) -> list[str]:
    """The faults of so many windows, one each: every one comes before any comes again.

    Raises:
        ValueError: there are fewer windows than faults.
    """
    others = [*others, QUIET]
    every = [*of_engines, *others]
    if windows < len(every):
        raise ValueError(f"{windows} windows do not hold {len(every)} faults; make the run longer")
    drawn: list[str] = []
    while len(drawn) < windows:
        early = not drawn or len(drawn) + len(every) <= windows * _WITH_ENGINE_FAULTS
        drawn += rng.sample(every if early else others, len(every if early else others))
    return drawn[:windows]
