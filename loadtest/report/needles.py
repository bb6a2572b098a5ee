"""Where answers were lost: by depth in the context and by length, one table per candidate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from loadtest.compare.types import Comparison
from loadtest.evaluation.pairs import AnswerKey, answer_key
from loadtest.measuring.types import length_label

_MOST_DEPTHS = 11
_BINS = 10


def tables(comparison: Comparison) -> list[dict[str, Any]]:
    """One table per candidate that has answers whose depth is known.

    Each has ``name``, ``number``, ``columns`` (lengths in words) and ``rows``: ``depth`` and ``cells`` with
    ``found`` (like ``7 / 8``), ``lost`` (share of what full attention finds, 0 to 1), ``fails`` (full
    attention finds none) and ``note``; an empty cell is ``None``.
    """
    answers = [
        (answer.depth, answer)
        for answer in comparison.answers
        if answer.depth is not None and not answer.error and math.isfinite(answer.score)
    ]
    lengths = sorted({answer.length for _, answer in answers})
    names, place = _depths(depth for depth, _ in answers)
    scores: dict[str, dict[tuple[int, int], dict[AnswerKey, float]]] = defaultdict(lambda: defaultdict(dict))
    for depth, answer in answers:
        scores[answer.deployment][place[depth], answer.length][answer_key(answer)] = answer.score
    full = scores[comparison.plan.full]
    return [
        {
            "name": candidate.name,
            "number": number,
            "columns": [length_label(length) for length in lengths],
            "rows": [
                {
                    "depth": name,
                    "cells": [
                        _cell(scores[candidate.name][row, length], full[row, length]) for length in lengths
                    ],
                }
                for row, name in enumerate(names)
            ],
        }
        for number, candidate in enumerate(comparison.plan.candidates)
        if scores[candidate.name]
    ]


def _depths(depths: Iterable[float]) -> tuple[list[str], dict[float, int]]:
    """Names of the rows, and which row a depth belongs to."""
    known = sorted(set(depths))
    if len(known) <= _MOST_DEPTHS:
        return [f"{depth:.0%}" for depth in known], {depth: row for row, depth in enumerate(known)}
    bins = {depth: min(int(depth * _BINS), _BINS - 1) for depth in known}
    rows = {number: row for row, number in enumerate(sorted(set(bins.values())))}
    names = [f"{number * 100 // _BINS} to {(number + 1) * 100 // _BINS}%" for number in rows]
    return names, {depth: rows[number] for depth, number in bins.items()}


def _cell(own: dict[AnswerKey, float], full: dict[AnswerKey, float]) -> dict[str, Any] | None:
    if not own:
        return None
    both = own.keys() & full.keys()
    found, asked = sum(own.values()), len(own)
    kept, had = sum(min(own[key], full[key]) for key in both), sum(full[key] for key in both)
    return {
        "found": f"{found:.3g} / {asked}",
        "lost": 1 - kept / had if had else 0.0,
        "fails": not had and bool(both),
        "note": f"full attention: {had:.3g} of {len(both)}",
    }
