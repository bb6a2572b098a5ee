"""Every figure of a judgment as rows of one table that sorts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from loadtest.compare.phrases import FIGURES, measure
from loadtest.compare.types import Evidence, Gain, Judgment
from loadtest.measuring.types import Interval
from loadtest.report import words

Cell = tuple[str, float | str, str]
"""Its words, what it sorts by, and its interval."""

NOTHING: Cell = (words.NONE, "", "")
"""Where there is no figure."""

_NATS, _SHARE = partial(words.loss, "logprob"), partial(words.quality, "agreement")

HEADS = (
    "attention",
    "figure",
    "context",
    "load",
    "full",
    "variant",
    "against full",
    "samples",
    "margin",
    "outcome",
    "samples missing",
)


def rows(judgment: Judgment, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row per test, figure of likeness and gain.

    Each has ``key``, ``name`` and ``number`` of the variant, and ``cells`` by the heads.

    Args:
        judgment: whose figures they are.
        numbers: places of the variants in the plan.
    """
    found: list[dict[str, Any]] = []
    for verdict in judgment.verdicts:
        cells = [("test", number, _test(one)) for number, one in enumerate(verdict.evidence)]
        for number, one in enumerate(verdict.likeness):
            cells += [
                ("kl", number, _like("text, KL divergence", one.length, _NATS, one.kl)),
                ("same", number, _like("text, same most likely token", one.length, _SHARE, one.same_top)),
            ]
        cells += [("gain", number, _gain(one)) for number, one in enumerate(verdict.gains)]
        name = verdict.deployment
        found += [
            {"key": f"{kind} {number} {name}", "name": name, "number": numbers[name], "cells": row}
            for kind, number, row in cells
        ]
    return found


def _test(one: Evidence) -> list[Cell]:
    show = partial(words.loss, one.unit)
    return [
        (f"{measure(one.measure)}, {one.unit}", one.measure, ""),
        (words.tokens(one.length), one.length, ""),
        NOTHING,
        (words.quality(one.unit, one.full), one.full, ""),
        (words.quality(one.unit, one.own), one.own, ""),
        _cell(show, one.loss),
        (str(one.loss.count), one.loss.count, ""),
        (show(one.margin), one.margin, ""),
        (str(one.outcome) if one.decides else f"({one.outcome})", str(one.outcome), ""),
        NOTHING if one.more is None else (f"{one.more:,}", one.more, ""),
    ]


def _like(figure: str, length: int, show: Callable[[float], str], found: Interval) -> list[Cell]:
    """Figures of likeness, which already compare with full attention: that has no figure of its own."""
    return [
        (figure, figure, ""),
        (words.tokens(length), length, ""),
        *[NOTHING] * 3,
        _cell(show, found),
        (str(found.count), found.count, ""),
        *[NOTHING] * 3,
    ]


def _gain(one: Gain) -> list[Cell]:
    show = partial(words.measured, one.figure)
    difference = _difference(one)
    return [
        (FIGURES[one.figure], one.figure, ""),
        (words.tokens(one.context), one.context, ""),
        (one.load.removeprefix(f"{words.tokens(one.context)}, ") or words.NONE, one.load, ""),
        _cell(show, one.full),
        _cell(show, one.own),
        _cell(words.ratio, one.ratio),
        (str(one.ratio.count), one.ratio.count, ""),
        NOTHING,
        (difference, difference, ""),
        NOTHING,
    ]


def _cell(show: Callable[[float], str], found: Interval) -> Cell:
    return show(found.value), found.value, words.ends(show, found)


def _difference(one: Gain) -> str:
    if one.equal_work:
        return "the same work"
    if not one.ratio.claimed:
        return words.NONE
    if not one.different:
        return "no difference shown"
    return "better" if one.ratio.value > 1 else "worse"
