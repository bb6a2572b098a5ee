"""Whether a machine is quiet enough to tell speeds apart, and if not, why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loadtest.measuring.analysis import drift, null, ratio, resolution, visits
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

_BUSY = "this machine is too busy to tell speeds apart: "
_REMEDY = "; end other programs, or take another machine"
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


def busy(
    measurements: Sequence[Measurement],
    equal_pairs: Iterable[EqualPair] = (),
    *,
    figures: Sequence[str] = ("tpot", "ttft"),
    margin: float = MARGIN,
    pair_margin: float = PAIR_MARGIN,
    confidence: float = 0.95,
) -> str:
    """Why this machine is too busy to tell speeds apart, a sentence without a full stop; empty if it is not.

    Args:
        measurements: of a run; the first is of the base.
        equal_pairs: deployments whose work is the same, as patterns' is where they cover the context.
        figures: to look at where they were measured; times.
        margin: share by which a deployment may differ from itself.
        pair_margin: share by which those of a pair may differ.
        confidence: of intervals. Since they must also lie beyond the margin, a quiet machine raises no false
            alarm although many are looked at.
    """
    places = list(dict.fromkeys((each.load, each.deployment) for each in measurements))
    reasons = [
        *(_disturbed(measurements, load) for load in dict.fromkeys(load for load, _ in places)),
        *(
            _unequal(measurements, pair, figure, pair_margin, confidence)
            for pair in equal_pairs
            for figure in figures
        ),
        *(_unsteady(measurements, *place, figures, margin, confidence) for place in places),
    ]
    return next((f"{_BUSY}{reason}{_REMEDY}" for reason in reasons if reason), "")


def _disturbed(measurements: Sequence[Measurement], load: str) -> str:
    """The visits of a load that stayed disturbed, if they are too many."""
    quiet: dict[tuple[str, int, int], bool] = {}
    disturbed = []
    for each in measurements:
        if each.load == load and not each.error:
            place = (each.deployment, each.round, each.visit)
            quiet[place] = not each.disturbed  # the last attempt is the one that is left
            disturbed += [each] if each.disturbed else []
    bad = sum(not fine for fine in quiet.values())
    if not bad or bad <= MOST_DISTURBED * len(quiet):
        return ""
    disturbed.sort(key=lambda each: each.weather.stolen + each.weather.foreign + each.weather.throttled)
    typical = disturbed[len(disturbed) // 2].disturbed
    return f"{bad} of {len(quiet)} measurements of {load} stayed disturbed however often repeated ({typical})"


def _unequal(
    measurements: Sequence[Measurement], pair: EqualPair, figure: str, margin: float, confidence: float
) -> str:
    """Deployments that do the same and yet differ."""
    found = ratio(measurements, pair.first, pair.second, pair.load, figure, confidence)
    if not _beyond(found, margin):
        return ""
    return (
        f"{pair.first} and {pair.second} read the same at {pair.load}, but {_WORDS.get(figure, figure)} "
        f"differs by a factor of {_factor(found)}"
    )


def _unsteady(
    measurements: Sequence[Measurement],
    load: str,
    deployment: str,
    figures: Sequence[str],
    margin: float,
    confidence: float,
) -> str:
    """A deployment that differs from itself, within rounds or, if it is the base, from round to round."""
    for figure in figures:
        if not visits(measurements, deployment, load, figure):
            continue
        words = f"{_WORDS.get(figure, figure)} of {deployment} at {load}"
        found = null(measurements, deployment, load, figure, confidence)
        if _beyond(found, margin):
            return (
                f"{words} differs between the two visits of a round, which do the same, by {_factor(found)}"
            )
        spread = resolution(measurements, deployment, load, figure)
        if spread > MOST_SPREAD:  # NaN is not
            return (
                f"{words} differs so much between visits that do the same that not even differences of "
                f"{spread:.0%} can be told"
            )
        change = drift(measurements, deployment, load, figure)
        if deployment == measurements[0].deployment and change > MOST_DRIFT:  # NaN is not
            return f"{words} changed by a factor of {change:.1f} from round to round"
    return ""


def _beyond(found: Interval, margin: float) -> bool:
    return found.low > 1 + margin or found.high < 1 / (1 + margin)  # NaN is neither


def _factor(found: Interval) -> str:
    low, high = sorted(max(end, 1 / end) for end in (found.low, found.high))
    return f"{max(found.value, 1 / found.value):.2f} ({low:.2f} to {high:.2f})"
