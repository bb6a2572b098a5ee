"""Products of parameters: a cover of them in ``make test``, all of them in ``make stress`` too."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

Axis = Mapping[str, Any] | Iterable[Any]


def every_value(**axes: Axis) -> pytest.MarkDecorator:
    """Parametrizes a test by all combinations of the axes' values; all but a few are marked ``stress``.

    In those few every value of every axis occurs, and about as often as the others of its axis.

    Args:
        axes: each parameter's values, which have an id each where they are a mapping.
    """
    return _covered(1, axes)


def every_pair(**axes: Axis) -> pytest.MarkDecorator:
    """The same for parameters that act on each other: any two values of two axes occur together."""
    return _covered(2, axes)


def _covered(together: int, axes: Mapping[str, Axis]) -> pytest.MarkDecorator:
    values = [_named(name, axis) for name, axis in axes.items()]
    combinations = list(itertools.product(*(range(len(axis)) for axis in values)))

    def parts(combination: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(combination), together))

    missing = set().union(*map(parts, combinations))
    used: Counter[tuple[int, int]] = Counter()
    quick = set()
    while missing:
        best = max(
            combinations,
            key=lambda combination: (
                len(parts(combination) & missing),
                -sum(used[at] for at in enumerate(combination)),
            ),
        )
        quick.add(best)
        missing -= parts(best)
        used.update(enumerate(best))
    cases = []
    for combination in combinations:
        ids, chosen = zip(*(axis[at] for axis, at in zip(values, combination, strict=True)), strict=True)
        marks = () if combination in quick else pytest.mark.stress
        cases.append(pytest.param(*chosen, id="-".join(ids), marks=marks))
    return pytest.mark.parametrize(tuple(axes), cases)


def _named(name: str, axis: Axis) -> list[tuple[str, Any]]:
    if isinstance(axis, Mapping):
        return list(axis.items())
    return [
        (f"{name}{at}" if isinstance(value, tuple | list | dict) else str(value), value)
        for at, value in enumerate(axis)
    ]
