"""Products of parameters: a cover of them in ``make test``, all of them in ``make stress`` too."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest


def product(*axes: Iterable[Any], together: int = 1) -> list[Any]:
    """Every combination of the axes' values, as parameters of a test.

    All but a few are marked ``stress``. In those few every value of every axis occurs, and about as often as
    the others of its axis.

    Args:
        axes: the values of one parameter each.
        together: 2 for parameters that act on each other: then every pair of values of two axes occurs.
    """
    values = [list(axis) for axis in axes]
    cases = list(itertools.product(*(range(len(axis)) for axis in values)))

    def parts(case: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), together))

    missing = set().union(*map(parts, cases))
    used: Counter[tuple[int, int]] = Counter()
    quick = set()
    while missing:
        best = max(
            cases, key=lambda case: (len(parts(case) & missing), -sum(used[at] for at in enumerate(case)))
        )
        quick.add(best)
        missing -= parts(best)
        used.update(enumerate(best))
    return [
        pytest.param(
            *(axis[at] for axis, at in zip(values, case, strict=True)),
            marks=() if case in quick else pytest.mark.stress,
        )
        for case in cases
    ]
