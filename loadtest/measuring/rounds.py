"""Measures deployments under loads in interleaved rounds.

A round visits every deployment there and back (A B C, then C B A), so that a steady change while it lasts,
like a processor that grows warm, affects all alike; each odd round starts at the other end. Compared figures
are paired within a round, minutes or seconds apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from loadtest.measuring import weather
from loadtest.measuring.requests import reason
from loadtest.measuring.types import CannotMeasureError, HasLabel, Measurement, Target
from longspan import LongspanError

MOST_REPEATS = 2
"""Repeats of a disturbed visit. Two get past occasional work; on a machine that is always busy more would not
help."""

LoadT = TypeVar("LoadT", bound=HasLabel)

_SEEDS_PER_ROUND = 2 * (1 + MOST_REPEATS)


class Rounds(Generic[LoadT]):
    """A run of rounds.

    Args:
        targets: by name; the first is the base, which the others are compared with.
        loads: what to put on them; labels are unique.
        seed: of all that is drawn.
        measurements: of an earlier run that this one goes on with; new ones are added to this very list.
        tell: called with each measurement.
        clock: in seconds.
        observe: see ``loadtest.measuring.weather.Observe``.

    Attributes:
        measurements: all, every attempt, in the order in which they were made.
        failed: by load's label and target's name, why it is measured no more.
    """

    def __init__(
        self,
        targets: Mapping[str, Target[LoadT]],
        loads: Sequence[LoadT],
        *,
        seed: int = 0,
        measurements: list[Measurement] | None = None,
        tell: Callable[[Measurement], None] = lambda measurement: None,
        clock: Callable[[], float] = time.monotonic,
        observe: weather.Observe = weather.observe,
    ) -> None:
        if not targets or not loads:
            raise ValueError("there is nothing to measure without a target and a load")
        if len({load.label for load in loads}) < len(loads):
            raise ValueError("two loads have one label; their measurements could not be told apart")
        self._targets, self._loads, self._seed = dict(targets), list(loads), seed
        self._tell, self._clock, self._observe = tell, clock, observe
        self.measurements: list[Measurement] = [] if measurements is None else measurements
        self.failed: dict[tuple[str, str], str] = {}
        self._base = next(iter(self._targets))
        self._rounds = {
            load.label: 1 + max((m.round for m in self.measurements if m.load == load.label), default=-1)
            for load in self._loads
        }
        self._latest = {(m.load, m.deployment): m.seconds for m in self.measurements}
        # An earlier run's time comes before this one's.
        self._offset = max((m.began + m.seconds for m in self.measurements), default=0.0)
        self._began = clock()
        self._end = float("inf")
        self._hopeless = False

    @property
    def rounds(self) -> dict[str, int]:
        """Complete rounds of each load, by label, earlier runs included."""
        return dict(self._rounds)

    def alive(self, load: LoadT) -> list[str]:
        """Targets that have not failed under this load."""
        return [name for name in self._targets if (load.label, name) not in self.failed]

    def estimate(self, load: LoadT) -> float:
        """Seconds that its next round will take, by the latest visits; 0 where nothing is known.

        A load without any counts as much as the dearest that is known.
        """
        known = {each.label: self._cost(each) for each in self._loads}
        return known[load.label] or max(known.values())

    def step(self, load: LoadT, end: float | None = None) -> list[Measurement]:
        """One round of one load: every target that has not failed under it, there and back.

        Visits that other work disturbed are repeated at the end of their pass, unless the last round before
        this one, of any load, stayed disturbed throughout in spite of that.

        Args:
            load: to put on them.
            end: time of the clock after which no visit begins; by default that of ``run``. Of a round that it
                cuts short only the visits that two targets have are compared.

        Returns:
            All attempts.
        """
        number = self._rounds[load.label]
        repeats = 0 if self._hopeless else MOST_REPEATS
        before, self._end = self._end, self._end if end is None else end
        try:
            made = [each for visit in (0, 1) for each in self.half(load, number, visit, repeats)]
        finally:
            self._end = before
        answered = [each for each in made if not each.error]
        self._hopeless = bool(answered) and all(each.disturbed for each in answered)
        self._rounds[load.label] = number + 1
        return made

    def half(self, load: LoadT, number: int, visit: int, repeats: int = MOST_REPEATS) -> list[Measurement]:
        """One pass of a round: every target that has not failed under the load, there or back.

        Args:
            load: to put on them.
            number: of the round.
            visit: 0 there, 1 back.
            repeats: of a visit that was disturbed, at the end of the pass.

        Returns:
            All attempts.
        """
        left = self.alive(load)[:: -1 if (number + visit) % 2 else 1]
        made: list[Measurement] = []
        for attempt in range(1 + repeats):
            alive = self.alive(load)
            found = [
                self._visit(load, name, number, visit, attempt)
                for name in left
                if name in alive and self._clock() < self._end
            ]
            made += found
            left = [each.deployment for each in found if each.disturbed]
            if not left or self._clock() >= self._end:
                break
        return made

    def run(self, budget: float, settled: Callable[[LoadT], bool]) -> bool:
        """Rounds of all loads by turns, until all are settled or the next one would not end in time.

        The load with the fewest rounds is next, so that all loads spread over the whole time.

        Args:
            budget: seconds.
            settled: a load needs no more rounds; asked after each round that it had.

        Returns:
            Whether all loads that could be measured are settled.
        """
        self._end = self._clock() + budget
        try:
            left = [load for load in self._loads if self._measurable(load) and not settled(load)]
            while left:
                now = self._clock()
                affordable = [load for load in left if now + self.estimate(load) <= self._end]
                if not affordable or now >= self._end:
                    return False
                load = min(affordable, key=lambda each: self._rounds[each.label])
                self.step(load)
                if not self._measurable(load) or settled(load):
                    left.remove(load)
            return True
        finally:
            self._end = float("inf")

    def _measurable(self, load: LoadT) -> bool:
        """Its rounds could still tell something."""
        alive = self.alive(load)
        return self._base in alive and (len(alive) > 1 or len(self._targets) == 1)

    def _cost(self, load: LoadT) -> float:
        return 2 * sum(self._latest.get((load.label, name), 0.0) for name in self.alive(load))

    def _visit(self, load: LoadT, name: str, number: int, visit: int, attempt: int) -> Measurement:
        target = self._targets[name]
        own = target.pids
        others = {pid for other, each in self._targets.items() if other != name for pid in each.pids or ()}
        # A repeat draws anew: a server's prefix cache would know the prompts of the first attempt.
        seed = self._seed + number * _SEEDS_PER_ROUND + attempt * 2 + visit
        seen = weather.unseen if own is None else self._observe(own, others - set(own))
        began = self._clock()
        figures: Mapping[str, float] = {}
        error = ""
        try:
            figures = dict(target.measure(load, seed))
        except (LongspanError, CannotMeasureError) as failure:
            error = reason(failure) if isinstance(failure, LongspanError) else str(failure)
            self.failed[load.label, name] = error
        seconds = self._clock() - began
        observed = seen()
        measurement = Measurement(
            deployment=name,
            load=load.label,
            round=number,
            visit=visit,
            attempt=attempt,
            began=self._offset + began - self._began,
            seconds=seconds,
            figures=figures,
            weather=observed.weather,
            disturbed="" if error else weather.disturbance(observed),
            error=error,
        )
        self._latest[load.label, name] = seconds
        self.measurements.append(measurement)
        self._tell(measurement)
        return measurement
