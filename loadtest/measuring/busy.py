"""Whether a machine is quiet enough to tell speeds apart, and if not, why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from loadtest.measuring.analysis import drift, ratios, repeated, resolution, visits
from loadtest.measuring.statistics import LEAST, least, median_interval
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
"""Confidence that a quiet machine raises no false alarm, for any number of deployments, loads and figures
and any variation of its visits (Bonferroni)."""

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


class Alarm(NamedTuple):
    """A sign that this machine is too busy to tell speeds apart.

    Attributes:
        kind: ``disturbed``: others' processor time; ``unequal``: equal work that differs; ``drift``: from
            round to round; ``lacking``: rounds that were set aside and not measured again yet.
        load: label.
        reason: in words.
        figure: in which it shows; empty where it is none.
        deployments: that it is about; empty where it is about all.
    """

    kind: Literal["disturbed", "unequal", "drift", "lacking"]
    load: str
    reason: str
    figure: str = ""
    deployments: tuple[str, ...] = ()


def busy(
    measurements: Sequence[Measurement], equal_pairs: Iterable[EqualPair] = (), confidence: float = CONFIDENCE
) -> str:
    """Why this machine is too busy to tell speeds apart, a sentence without a full stop; empty if it is not.

    Args:
        measurements: of a run; the first is of the base.
        equal_pairs: deployments whose work is the same, as patterns' is where they cover the context.
        confidence: of the run's intervals; it says how many rounds they take.
    """
    return sentence(alarms(measurements, equal_pairs, confidence), measurements)


def sentence(found: Sequence[Alarm], measurements: Sequence[Measurement]) -> str:
    """The sentence of ``busy``.

    Args:
        found: by ``alarms``.
        measurements: of which.
    """
    for alarm in found:
        again = set_aside(measurements, alarm.load)
        repeated = alarm.kind in ("unequal", "drift") and again
        even = f", although {_rounds(len(again))} of it had been measured again" if repeated else ""
        return f"{_BUSY}{alarm.reason}{even}{_REMEDY}"
    return ""


def set_aside(measurements: Iterable[Measurement], load: str) -> dict[int, str]:
    """Rounds of a load that don't count, by number: why."""
    return {each.round: each.set_aside for each in measurements if each.load == load and each.set_aside}


def not_counted(measurements: Sequence[Measurement]) -> list[str]:
    """Rounds that were set aside, a sentence without a full stop for each load and reason."""
    found = []
    for load in dict.fromkeys(each.load for each in measurements):
        reasons = list(set_aside(measurements, load).values())
        found += [
            f"{_rounds(reasons.count(why))} of {load} did not count: {why}" for why in dict.fromkeys(reasons)
        ]
    return found


def alarms(
    measurements: Sequence[Measurement], equal_pairs: Iterable[EqualPair] = (), confidence: float = CONFIDENCE
) -> list[Alarm]:
    """All signs, the most telling first; see ``busy``.

    Args:
        measurements: of a run.
        equal_pairs: deployments that do the same.
        confidence: of the run's intervals; it says how many rounds they take. Alarms have their own.
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
    found = [
        *(_disturbed(those, load) for load, those in by_load.items()),
        *(_unequal(by_load.get(pair.load, []), pair, each, chance) for pair, each in pairs),
        *(_spread(those, load) for load, those in by_load.items()),
        *(_unsteady(those, place, base, chance) for place, those in by_place.items()),
        *(
            _lacking(those, load, least(confidence))
            for (load, name), those in by_place.items()
            if name == base
        ),
    ]
    return [alarm for alarm in found if alarm is not None]


def _disturbed(measurements: Sequence[Measurement], load: str) -> Alarm | None:
    """The visits of a load that stayed disturbed, if they are too many: of all and of the latest rounds.

    A run that goes on with an earlier one when the machine is quiet is not held back by that one for long.
    """
    quiet: dict[tuple[str, int, int], bool] = {}
    disturbed = []
    for each in measurements:
        if not each.error and not each.set_aside:
            place = (each.deployment, each.round, each.visit)
            quiet[place] = not each.disturbed  # the last attempt is the one that is left
            disturbed += [each] if each.disturbed else []
    first = max((number for _, number, _ in quiet), default=0) - LEAST
    recent = [fine for (_, number, _), fine in quiet.items() if number > first]
    bad = sum(not fine for fine in quiet.values())
    if bad <= MOST_DISTURBED * len(quiet) or sum(recent) >= (1 - MOST_DISTURBED) * len(recent):
        return None
    disturbed.sort(key=lambda each: each.weather.stolen + each.weather.foreign + each.weather.throttled)
    typical = disturbed[len(disturbed) // 2].disturbed
    return Alarm(
        "disturbed",
        load,
        f"{bad} of {len(quiet)} measurements of {load} stayed disturbed however often repeated ({typical})",
    )


def _unequal(
    measurements: Sequence[Measurement], pair: EqualPair, figure: str, chance: float
) -> Alarm | None:
    """Alarms of deployments that do equal work and yet differ, in all rounds or in some."""
    values = ratios(measurements, pair.first, pair.second, pair.load, figure)
    found = _beyond(values, PAIR_MARGIN, chance)
    same = f"{pair.first} and {pair.second} read the same at {pair.load}"
    if found is None:
        change = _change(values, measurements, pair, figure, chance)
        if change <= 1 + PAIR_MARGIN:
            return None
        reason = f"{same}, but how they compare in {_WORDS[figure]} changed by a factor of {change:.2f}"
        return Alarm("unequal", pair.load, f"{reason} from round to round", figure, pair[:2])
    reason = f"{same}, but {_WORDS[figure]} differs by a factor of {_factor(found)}"
    return Alarm("unequal", pair.load, reason, figure, pair[:2])


def _change(
    values: Sequence[float], measurements: Sequence[Measurement], pair: EqualPair, figure: str, chance: float
) -> float:
    """Largest over smallest median of three ratios of a pair in a row; 1 where luck may have made them.

    The spread s of chance is estimated from how far each of the two differs from itself within rounds. The
    logarithm of a round's ratio varies as much as that of one visit, s, and the median of three by 0.67 s.
    """
    logs = [
        math.log(each)
        for name in (pair.first, pair.second)
        for each in repeated(measurements, name, pair.load, figure)
    ]
    smooth = [math.log(statistics.median(values[at : at + 3])) for at in range(len(values) - 2)]
    if len(values) < LEAST or len(logs) < LEAST:
        return 1.0
    visit = math.sqrt(statistics.fmean(each**2 for each in logs) / 2)
    luck = 2 * 0.67 * visit * student_quantile(chance / (2 * len(smooth)), len(logs) - 1)
    change = max(smooth) - min(smooth)
    return math.exp(change) if change > luck else 1.0


def _spread(measurements: Sequence[Measurement], load: str) -> Alarm | None:
    """Deployments that differ from themselves in changing directions."""
    for figure in _WORDS:
        spread = resolution(measurements, load, figure)
        if spread > MOST_SPREAD:  # NaN is not
            reason = (
                f"{_WORDS[figure]} at {load} differs so much between visits that do the same "
                f"that not even differences of {spread:.0%} can be told"
            )
            return Alarm("unequal", load, reason, figure)
    return None


def _unsteady(
    measurements: Sequence[Measurement], place: tuple[str, str], base: str, chance: float
) -> Alarm | None:
    """A deployment that differs from itself, within rounds or, if it is the base, from round to round."""
    load, deployment = place
    for figure in _WORDS:
        if not visits(measurements, deployment, load, figure):
            continue
        words = f"{_WORDS[figure]} of {deployment} at {load}"
        found = _beyond(repeated(measurements, deployment, load, figure), MARGIN, chance)
        if found is not None:
            reason = f"{words} differs between visits that do the same by a factor of {_factor(found)}"
            return Alarm("unequal", load, reason, figure, (deployment,))
        change = drift(measurements, deployment, load, figure)
        if deployment == base and change > MOST_DRIFT:  # NaN is not
            reason = f"{words} changed by a factor of {change:.1f} from round to round"
            return Alarm("drift", load, reason, figure, (base,))
    return None


def _lacking(measurements: Sequence[Measurement], load: str, enough: int) -> Alarm | None:
    """Fewer rounds than an interval takes, since others were set aside; told by those of the base."""
    aside = set_aside(measurements, load)
    left = {each.round for each in measurements if each.figures} - aside.keys()
    if not aside or len(left) >= enough:
        return None
    why = list(aside.values())[-1]
    reason = f"{_rounds(len(aside))} of {load} did not count ({why}), and only {len(left)} came after them"
    return Alarm("lacking", load, reason)


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count != 1)}"


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
