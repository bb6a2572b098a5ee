"""Few cases in which any two values meet, for ``make test``; all others are for ``make stress``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def pairwise(**axes: Mapping[str, Any] | Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by all combinations of the axes' values.

    ``make test`` runs few of them: every value of an axis meets every value of every other axis in one of
    those at least. The others are marked ``stress``.

    Args:
        axes: two or more parameters' values, which have an id each where they are a mapping.
    """
    named = [
        list(values.items()) if isinstance(values, Mapping) else [(str(value), value) for value in values]
        for values in axes.values()
    ]
    combinations = list(itertools.product(*(range(len(values)) for values in named)))
    missing = set().union(*map(_pairs, combinations))
    chosen = set()
    while missing:
        best = max(combinations, key=lambda combination: len(missing & _pairs(combination)))
        chosen.add(best)
        missing -= _pairs(best)
    cases = []
    for combination in combinations:
        ids, values = zip(*(axis[i] for axis, i in zip(named, combination, strict=True)), strict=True)
        marks = [] if combination in chosen else [pytest.mark.stress]
        cases.append(pytest.param(*values, id="-".join(ids), marks=marks))
    return pytest.mark.parametrize(tuple(axes), cases)


def _pairs(combination: tuple[int, ...]) -> set[Any]:
    """The values that meet in it, by their axes."""
    return set(itertools.combinations(enumerate(combination), 2))
