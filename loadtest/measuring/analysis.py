"""From measurements to figures with intervals. A round is one sample; those of a pair are held together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from loadtest.measuring.statistics import LEAST, median_interval
from loadtest.measuring.types import Interval, Measurement

NARROW = 0.025
"""Half an interval's width, as a share of its value, below which more rounds would tell nothing that matters:
half of the least gain that is worth a change."""


def is_rate(figure: str) -> bool:
    """More of it is better; of times, less is."""
    return figure.endswith("_rate")


def visits(
    measurements: Iterable[Measurement], deployment: str, load: str, figure: str
) -> dict[tuple[int, int], float]:
    """The figure of each visit, by round and visit; disturbed attempts don't count, failed ones have none."""
    return {
        (each.round, each.visit): each.figures[figure]
        for each in measurements
        if (each.deployment, each.load) == (deployment, load)
        and not each.disturbed
        and figure in each.figures
    }


def series(measurements: Iterable[Measurement], deployment: str, load: str, figure: str) -> dict[int, float]:
    """One value per round, by round: the mean of its visits that count."""
    return _by_round(visits(measurements, deployment, load, figure))


def own(
    measurements: Iterable[Measurement], deployment: str, load: str, figure: str, confidence: float = 0.95
) -> Interval:
    """A deployment's figure: the median of its rounds."""
    return median_interval(list(series(measurements, deployment, load, figure).values()), confidence)


def ratio(
    measurements: Sequence[Measurement],
    deployment: str,
    base: str,
    load: str,
    figure: str,
    confidence: float = 0.95,
) -> Interval:
    """How many times better than the base: the median of the rounds' ratios.

    Above 1 is better: base's time over own time, own rate over base's rate. Within a round only visits that
    both have are compared, so that what changes while a round lasts weighs on both.

    Args:
        measurements: of a run.
        deployment: the numerator's name.
        base: the other's.
        load: label.
        figure: name.
        confidence: of the interval.
    """
    return median_interval(ratios(measurements, deployment, base, load, figure), confidence)


def ratios(
    measurements: Sequence[Measurement], deployment: str, base: str, load: str, figure: str
) -> list[float]:
    """How many times better than the base in each round; see ``ratio``."""
    mine = visits(measurements, deployment, load, figure)
    theirs = visits(measurements, base, load, figure)
    both = mine.keys() & theirs.keys()
    ours = _by_round({place: mine[place] for place in both})
    bases = _by_round({place: theirs[place] for place in both})
    return [
        (ours[number] / bases[number]) if is_rate(figure) else (bases[number] / ours[number])
        for number in sorted(ours)
        if ours[number] > 0 and bases[number] > 0
    ]


def repeated(measurements: Iterable[Measurement], deployment: str, load: str, figure: str) -> list[float]:
    """How many times better a round's second visit was than its first, for each round that has both.

    Both did equal work, so it is how much the machine differs from itself.
    """
    found = visits(measurements, deployment, load, figure)
    found = {place: value for place, value in found.items() if value > 0}
    both = [number for number, visit in found if visit == 0 and (number, 1) in found]
    pairs = [(found[number, 0], found[number, 1]) for number in both]
    return [second / first if is_rate(figure) else first / second for first, second in pairs]


def resolution(measurements: Iterable[Measurement], load: str, figure: str) -> float:
    """Half the width that an interval of a ratio of equal work has at least after so many rounds, a share.

    From what all deployments differ from themselves between the two visits of a round. A round's figure is
    the mean of both, so that it varies less by the square root of 2. Taken from the outer deciles of the
    logarithms, so that single outliers don't count: 1.96 standard errors of a normal sample's median, which
    are 1.2533 sigma / sqrt(n). Of few samples the deciles may lie far apart by chance: their distance is
    taken two of its own standard errors (0.889 sigma / sqrt(n)) smaller. NaN where there are too few rounds.
    """
    cells = list(measurements)
    names = dict.fromkeys(each.deployment for each in cells)
    series_of = [repeated(cells, name, load, figure) for name in names]
    series_of = [each for each in series_of if len(each) >= LEAST]
    if not series_of:
        return math.nan
    logs = [math.log(each) for one in series_of for each in one]
    low, *_, high = statistics.quantiles(logs, n=10, method="inclusive")
    sigma = (high - low) / 2.563 / (1 + 2 * 0.889 / math.sqrt(len(logs)))
    rounds = min(map(len, series_of))
    return math.expm1(1.96 * 1.2533 * sigma / math.sqrt(2 * rounds))


def drift(measurements: Iterable[Measurement], deployment: str, load: str, figure: str) -> float:
    """How much a deployment's rounds differ over time: largest over smallest median of three in a row.

    1 is none, NaN where there are fewer than three. A single slow round is no drift.
    """
    values = list(series(measurements, deployment, load, figure).values())
    smooth = [statistics.median(values[at : at + 3]) for at in range(len(values) - 2)]
    return max(smooth) / min(smooth) if smooth and min(smooth) > 0 else math.nan


def settled(
    measurements: Sequence[Measurement],
    deployment: str,
    base: str,
    load: str,
    figure: str,
    margin: float = 0.05,
    confidence: float = 0.95,
) -> bool:
    """More rounds would not change what can be said of this ratio.

    Its interval is narrow, or beyond the margin of equivalence on one side. That it excludes 1 is not enough:
    a run that stops as soon as it does finds differences where there are none.

    Args:
        measurements: of a run.
        deployment: name.
        base: the other's.
        load: label.
        figure: name.
        margin: share below which a difference is not worth a change.
        confidence: of the interval.
    """
    found = ratio(measurements, deployment, base, load, figure, confidence)
    if not found.claimed:
        return False
    narrow = (found.high - found.low) / 2 < NARROW * found.value
    return narrow or found.low > 1 + margin or found.high < 1 / (1 + margin)


def _by_round(found: dict[tuple[int, int], float]) -> dict[int, float]:
    numbers = sorted({number for number, _ in found})
    return {
        number: statistics.fmean(found[number, visit] for visit in (0, 1) if (number, visit) in found)
        for number in numbers
    }
