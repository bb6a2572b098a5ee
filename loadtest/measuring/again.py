"""Rounds that are measured again, since cells in them that do equal work differ, or the machine drifted.

Processor time of others shows in each visit, and such a visit is repeated at once (``rounds``). Other signs
show only over several rounds (``busy``) and are answered here: rounds of that load are set aside. They stay
among the measurements with the reason and count nowhere, and new ones are measured in their place.

The rounds that are set aside must not depend on which deployment they favor, else it would add a bias:

- Equal work differs, between two deployments or between the visits of a round: all rounds of the load so far.
  No rounds are selected, and the new ones are independent of those that raised the alarm. Leaving
  out only the rounds that differ most would silence the alarm by itself.
- Drift: every round whose level is slower than the quietest three rounds in a row by more than a factor of
  ``MOST_LEVEL``. The level is the median over all deployments of how much slower each was than its own
  median. Exchanging two deployments changes no level, so that the noise of their ratio stays symmetric in the
  rounds that are left. If only one of three or more drifts, even the base, the level does not change, and
  nothing is set aside.

Nothing is set aside without an alarm, which a quiet machine raises in at most 1 of 20 looks. It is bounded: a
load is measured again ``MOST_AGAIN`` times. If there is an alarm still, it stands.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import replace

from loadtest.measuring.analysis import series
from loadtest.measuring.busy import CONFIDENCE, MOST_DRIFT, Alarm, set_aside
from loadtest.measuring.rounds import MOST_REPEATS
from loadtest.measuring.statistics import least
from loadtest.measuring.types import Measurement

MOST_AGAIN = MOST_REPEATS
"""Times that rounds of a load are set aside, for the same reason as of a visit."""

MOST_LEVEL = math.sqrt(MOST_DRIFT)
"""Largest level of a round against the quietest: rounds within it can't drift by ``MOST_DRIFT`` again."""

_SMOOTH = 3  # rounds in a row, as ``analysis.drift`` takes them


class Again:
    """Sets rounds aside, and remembers how often it did.

    Args:
        measurements: of the run, changed in place.
        confidence: of its intervals; it says how many rounds they take.
    """

    def __init__(self, measurements: list[Measurement], confidence: float = CONFIDENCE) -> None:
        self._measurements, self._least = measurements, least(confidence)
        self._times: dict[str, int] = {}

    def due(self, load: str) -> bool:
        """Rounds of this load were set aside, and there are fewer than an interval takes in their place."""
        return bool(set_aside(self._measurements, load)) and self.counted(load) < self._least

    def counted(self, load: str) -> int:
        """Rounds of a load that count, of all deployments."""
        return len({each.round for each in self._measurements if each.load == load and not each.set_aside})

    def answer(self, alarm: Alarm, alive: Collection[str]) -> bool:
        """Sets aside the rounds that an alarm calls for.

        Args:
            alarm: of the present measurements.
            alive: deployments that can be measured; rounds with others could not be measured again.

        Returns:
            Whether there was anything.
        """
        times = self._times.get(alarm.load, 0)
        rounds = spoiled(self._measurements, alarm, alive) if times < MOST_AGAIN else set()
        if not rounds:
            return False
        self._times[alarm.load] = times + 1
        for place, each in enumerate(self._measurements):
            if each.load == alarm.load and each.round in rounds:
                self._measurements[place] = replace(each, set_aside=alarm.reason)
        return True


def spoiled(measurements: Sequence[Measurement], alarm: Alarm, alive: Collection[str]) -> set[int]:
    """The rounds that an alarm says are to be measured again; see the module.

    Args:
        measurements: of a run.
        alarm: of them.
        alive: deployments that can be measured.
    """
    if alarm.kind not in ("unequal", "drift") or not set(alarm.deployments) <= set(alive):
        return set()
    those = [each for each in measurements if each.load == alarm.load]
    fixed = {each.round for each in those if each.deployment not in alive} | set_aside(
        those, alarm.load
    ).keys()
    if alarm.kind == "unequal":
        return {each.round for each in those} - fixed
    found = levels(those, alarm.load, alarm.figure)
    values = list(found.values())
    smooth = [statistics.median(values[at : at + _SMOOTH]) for at in range(len(values) - _SMOOTH + 1)]
    return {number for number, level in found.items() if level > MOST_LEVEL * min(smooth)} - fixed


def levels(measurements: Sequence[Measurement], load: str, figure: str) -> dict[int, float]:
    """How slow the machine was in each round: a time's median over deployments, each relative to its own.

    Args:
        measurements: of a run.
        load: label.
        figure: a time.
    """
    names = dict.fromkeys(each.deployment for each in measurements)
    shares: dict[int, list[float]] = {}
    for name in names:
        found = series(measurements, name, load, figure)
        usual = statistics.median(found.values()) if found else 0.0
        for number, value in found.items():
            if usual > 0 and value > 0:
                shares.setdefault(number, []).append(math.log(value / usual))
    return {number: math.exp(statistics.median(shares[number])) for number in sorted(shares)}
