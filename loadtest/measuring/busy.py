"""Whether a machine is quiet enough to tell speeds apart, and if not, why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loadtest.measuring.analysis import drift, ratios, repeated, resolution, visits
from loadtest.measuring.statistics import LEAST, median_interval
from loadtest.measuring.student import student_quantile
from loadtest.measuring.types import Interval, Measurement

MOST_DISTURBED = 0.5
"""Share of visits that may stay disturbed: beyond it the quiet ones are the exception, not the rule."""

MOST_SPREAD = 0.25
"""Half the interval of a ratio of equal work. Where a machine can't be told from one that is a quarter
faster, variants can't either: the gains that are looked for are of that size."""

MOST_DRIFT = 2.0
"""Largest over smallest of a deployment's rounds. Pairing cancels what changes slowly, and a laptop that
grows warm loses a third; where speed halves, the machine is another one."""

MARGIN = 0.05
"""Share by which a deployment may differ from itself."""

PAIR_MARGIN = 0.1
"""Share by which two deployments may differ whose attention reads the same: more than ``MARGIN``, since a
pattern has work of its own, like reading the summaries of pages."""

CONFIDENCE = 0.95
"""That a quiet machine raises no false alarm, however many deployments, loads and figures are looked at, and
however much its visits vary (Bonferroni)."""

_BUSY = "this machine is too busy to tell speeds apart: "
_REMEDY = "; end other programs, or take another machine"
# Of the figures that are looked at, where they were measured.
_WORDS = {"tpot": "time per output token", "ttft": "time to first token"}


class EqualPair(NamedTuple):
    """Two deployments whose attention reads the same under a load.

    Attributes:
        first: name.
        second: name.
        load: label.
    """

    first: str
    second: str
    load: str


def busy(measurements: Sequence[Measurement], equal_pairs: Iterable[EqualPair] = ()) -> str:
    """Why this machine is too busy to tell speeds apart, a sentence without a full stop; empty if it is not.

    Args:
        measurements: of a run; the first is of the base.
        equal_pairs: deployments whose work is the same, as patterns' is where they cover the context.
    """
    # Each question needs few of them, and there may be thousands.
    by_load: dict[str, list[Measurement]] = {}
    by_place: dict[tuple[str, str], list[Measurement]] = {}
    for each in measurements:
        by_load.setdefault(each.load, []).append(each)
        by_place.setdefault((each.load, each.deployment), []).append(each)
    base = measurements[0].deployment if measurements else ""
    pairs = [(pair, figure) for pair in equal_pairs for figure in _WORDS]
    chance = (1 - CONFIDENCE) / max(1, len(pairs) + len(by_place) * len(_WORDS))
    reasons = [
        *(_disturbed(those, load) for load, those in by_load.items()),
        *(_unequal(by_load.get(pair.load, []), pair, each, chance) for pair, each in pairs),
        *(_spread(those, load) for load, those in by_load.items()),
        *(_unsteady(those, place, base, chance) for place, those in by_place.items()),
    ]
    return next((f"{_BUSY}{reason}{_REMEDY}" for reason in reasons if reason), "")


def _disturbed(measurements: Sequence[Measurement], load: str) -> str:
    """The visits of a load that stayed disturbed, if they are too many: of all and of the latest rounds.

    A run that goes on with an earlier one when the machine is quiet is not held back by that one for long.
    """
    quiet: dict[tuple[str, int, int], bool] = {}
    disturbed = []
    for each in measurements:
        if not each.error:
            place = (each.deployment, each.round, each.visit)
            quiet[place] = not each.disturbed  # the last attempt is the one that is left
            disturbed += [each] if each.disturbed else []
    first = max((number for _, number, _ in quiet), default=0) - LEAST
    recent = [fine for (_, number, _), fine in quiet.items() if number > first]
    bad = sum(not fine for fine in quiet.values())
    if bad <= MOST_DISTURBED * len(quiet) or sum(recent) >= (1 - MOST_DISTURBED) * len(recent):
        return ""
    disturbed.sort(key=lambda each: each.weather.stolen + each.weather.foreign + each.weather.throttled)
    typical = disturbed[len(disturbed) // 2].disturbed
    return f"{bad} of {len(quiet)} measurements of {load} stayed disturbed however often repeated ({typical})"


def _unequal(measurements: Sequence[Measurement], pair: EqualPair, figure: str, chance: float) -> str:
    """Deployments that do the same and yet differ."""
    found = _beyond(ratios(measurements, pair.first, pair.second, pair.load, figure), PAIR_MARGIN, chance)
    if found is None:
        return ""
    return (
        f"{pair.first} and {pair.second} read the same at {pair.load}, but {_WORDS[figure]} "
        f"differs by a factor of {_factor(found)}"
    )


def _spread(measurements: Sequence[Measurement], load: str) -> str:
    """Deployments that differ from themselves now this way, now that."""
    for figure in _WORDS:
        spread = resolution(measurements, load, figure)
        if spread > MOST_SPREAD:  # NaN is not
            return (
                f"{_WORDS[figure]} at {load} differs so much between visits that do the same "
                f"that not even differences of {spread:.0%} can be told"
            )
    return ""


def _unsteady(measurements: Sequence[Measurement], place: tuple[str, str], base: str, chance: float) -> str:
    """A deployment that differs from itself, within rounds or, if it is the base, from round to round."""
    load, deployment = place
    for figure in _WORDS:
        if not visits(measurements, deployment, load, figure):
            continue
        words = f"{_WORDS[figure]} of {deployment} at {load}"
        found = _beyond(repeated(measurements, deployment, load, figure), MARGIN, chance)
        if found is not None:
            return f"{words} differs between visits that do the same by a factor of {_factor(found)}"
        change = drift(measurements, deployment, load, figure)
        if deployment == base and change > MOST_DRIFT:  # NaN is not
            return f"{words} changed by a factor of {change:.1f} from round to round"
    return ""


def _beyond(values: Sequence[float], margin: float, chance: float) -> Interval | None:
    """The median of ratios, if it surely differs from 1 by more than the margin.

    ``chance``: that it does so by luck.

    Its bootstrap interval can't be made as sure as many looks need of a few rounds, so that Student's test of
    the logarithms has to say so too.
    """
    found = median_interval(values, CONFIDENCE)
    if not (found.low > 1 + margin or found.high < 1 / (1 + margin)):  # NaN is neither
        return None
    logs = [math.log(each) for each in values]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    quantile = student_quantile(chance / 2, len(logs) - 1)
    return found if abs(statistics.fmean(logs)) - math.log1p(margin) > quantile * error else None


def _factor(found: Interval) -> str:
    low, high = sorted(max(end, 1 / end) for end in (found.low, found.high))
    return f"{max(found.value, 1 / found.value):.2f} ({low:.2f} to {high:.2f})"
