"""Until slice B's analysis is merged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from loadtest.measuring.types import Interval, Measurement
from loadtest.statistics import median_interval


def series(cells: Sequence[Measurement], deployment: str, load: str, figure: str) -> dict[int, float]:
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for cell in cells:
        if (cell.deployment, cell.load) == (deployment, load) and not cell.error and not cell.disturbed:
            if figure in cell.figures and not math.isnan(cell.figures[figure]):
                found[cell.round][cell.visit] = cell.figures[figure]
    return {r: fmean(v.values()) for r, v in found.items() if len(v) == 2}


def own(cells: Sequence[Measurement], deployment: str, load: str, figure: str, confidence: float) -> Interval:
    return median_interval(list(series(cells, deployment, load, figure).values()), confidence)


def ratio(
    cells: Sequence[Measurement], base: str, name: str, load: str, figure: str, confidence: float
) -> Interval:
    theirs, ours = series(cells, base, load, figure), series(cells, name, load, figure)
    rate = figure in ("output_rate", "prefill_rate")
    return median_interval(
        [ours[r] / theirs[r] if rate else theirs[r] / ours[r] for r in sorted(theirs.keys() & ours.keys())],
        confidence,
    )
