"""Measures with servers that are alive at the same time: rounds of speed and steps of quality by turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from loadtest.compare.equal import equal_pairs
from loadtest.compare.evaluator import FIRST_RATE, Evaluator
from loadtest.compare.gains import operators_load
from loadtest.compare.judge import judge
from loadtest.compare.plan import Material
from loadtest.compare.stopping import open_tests, speeds_settled
from loadtest.compare.types import Comparison, Judgment
from loadtest.compare.units import Unit
from loadtest.deployment import Deployment
from loadtest.measuring.again import Again
from loadtest.measuring.busy import Alarm, alarms, sentence, set_aside
from loadtest.measuring.rounds import Rounds
from loadtest.measuring.served import Served
from loadtest.measuring.statistics import least
from loadtest.measuring.types import Load, Measurement
from longspan import Client

SPEED_SHARE = 0.45
"""Share of the time for speed while both speed and quality lack evidence."""

LONGEST_STEP = 0.25
"""Share of the time for one round: on a busy machine the first could take all of it before that is known."""

MOST_ROUNDS = 40
"""Most rounds of a load with the same servers: an interval that is still wide then would take hours."""

PATIENCE = 10.0
"""Times the duration that is expected after which a request is given up: its server hangs."""

LEAST_PATIENCE = 120.0
"""Seconds that any request is given: an expectation may be of a quieter minute."""

LEAST_UNITS = 3
"""Contexts of each task and length, and slices of text, for every variant whose verdict is open anywhere."""


def _place(unit: Unit) -> tuple[str, int]:
    """The key by which units are counted."""
    return unit.task or unit.kind, unit.length


class FullFailedError(RuntimeError):
    """Full attention's server failed, and nothing can be compared without it; the message says how."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Callbacks of a run.

    Attributes:
        doing: called with what is under way, in a few words.
        judged: called with the judgment whenever there is more of it.
    """

    doing: Callable[[str], None]
    judged: Callable[[Judgment], None]


def fail(comparison: Comparison, reasons: Mapping[str, str]) -> None:
    """Records candidates that can't be measured any more.

    Args:
        comparison: to note them in.
        reasons: by name.

    Raises:
        FullFailedError: full attention is among them.
    """
    full = comparison.plan.full
    if full in reasons:
        raise FullFailedError(f"{full} failed while it was measured: {reasons[full]}")
    comparison.failed.update(reasons)


class Group:
    """Servers that are alive at the same time, and their remaining measurements."""

    def __init__(
        self,
        whole: Comparison,
        material: Material,
        part: Sequence[Deployment],
        targets: Mapping[str, Served],
        clients: Mapping[str, Client],
        end: float,
        listener: Listener,
        clock: Callable[[], float],
        rate: float = FIRST_RATE,
    ) -> None:
        self._whole, self._targets, self._clients = whole, targets, clients
        # It has the whole comparison's rows, but only this group's candidates are missing from it.
        self._own = replace(whole, plan=replace(whole.plan, candidates=tuple(part)))
        self._end, self._listener, self._clock = end, listener, clock
        self._units_for_all = material.units
        self._booked = clock()
        self._longest_step = LONGEST_STEP * (end - self._booked)
        self._spent = {"speed": 0.0, "quality": 0.0}
        self._done: dict[tuple[str, int], int] = {}
        self._allow(0.0)
        plan = self._own.plan
        self._rounds: Rounds[Load] = Rounds(
            targets,
            plan.loads,
            seed=plan.seed,
            measurements=self._own.speed,
            tell=self._progress,
            clock=clock,
        )
        self._before = self._rounds.rounds
        self._alarms: list[Alarm] = []
        self._again = Again(self._own.speed, plan.confidence)
        self._evaluator = Evaluator(
            self._own,
            clients[plan.full],
            text=material.text,
            prose=material.prose,
            own=material.own,
            rate=rate,
            address=(targets[plan.full].host, targets[plan.full].port),
        )
        self._units = self._evaluator.units()
        # The sequence of units is infinite; as many as this contain every kind.
        self._kinds = 2 * (plan.kinds + len(material.own))

    def measure(self) -> None:
        """Rounds and units by turns until nothing is open or the time is up."""
        judgment = self._judge()
        while True:
            load, unit = self._next_load(), self._next_unit(judgment)
            if unit is None and load is None:
                return
            while load is not None and (unit is None or self._speed_is_due(load)):
                self._measure(load)
                # Judged after each, so that alarms are seen, results are saved and the live page shows them.
                judgment = self._judge()
                load = self._next_load()
            # The rounds took time of it, and may have ended a variant; a unit that is cut off is repeated.
            names = self._candidates_for(unit, judgment) if unit else frozenset()
            if unit and names and self._evaluator.cost(unit, names) < self._left:
                self._evaluate(unit, names)
                judgment = self._judge()

    @property
    def _left(self) -> float:
        return self._end - self._clock()

    def _measure(self, load: Load) -> None:
        began = self._clock()
        self._allow(self._rounds.estimate(load))
        self._rounds.step(load, min(self._end, began + self._longest_step))
        fail(self._whole, {name: reason for (_, name), reason in self._rounds.failed.items()})
        self._spent["speed"] += self._clock() - began

    def _evaluate(self, unit: Unit, names: Collection[str]) -> None:
        self._listener.doing(unit.label)
        began = self._clock()
        whole, own = self._whole, self._own
        asked = {name: client for name, client in self._clients.items() if name in names}
        place = _place(unit)
        self._allow(self._evaluator.cost(unit, names) if place in self._done else 0.0)
        rows = self._evaluator.run(unit, asked, self._end)
        rows.add_to(own)
        # At once, so that an interrupted run keeps them.
        whole.answers, whole.text, whole.memory = own.answers, own.text, own.memory
        fail(whole, rows.failed)
        self._done[place] = self._done.get(place, 0) + 1
        self._spent["quality"] += self._clock() - began

    def _allow(self, expected: float) -> None:
        """Gives requests a time after which their server hangs; 0 is expected where nothing is known."""
        seconds = max(LEAST_PATIENCE, min(self._left, PATIENCE * expected) if expected else self._left)
        for target in self._targets.values():
            target.allow(seconds)
        for client in self._clients.values():
            client.timeout = seconds

    def _judge(self) -> Judgment:
        """The judgment of the whole comparison."""
        whole = self._whole
        now = self._clock()
        whole.spent += now - self._booked
        self._booked = now
        pairs = equal_pairs(whole)
        self._alarms = alarms(whole.speed, pairs, whole.plan.confidence)
        if self._set_aside():
            self._alarms = alarms(whole.speed, pairs, whole.plan.confidence)
        whole.busy = sentence(self._alarms, whole.speed)
        judgment = judge(whole)
        self._listener.judged(judgment)
        return judgment

    def _set_aside(self) -> bool:
        """Sets aside the rounds that alarms call for, where there is time to measure as many again."""
        answered = False
        plan = self._own.plan
        for load in plan.loads:
            if least(plan.confidence) * self._rounds.estimate(load) < self._left:
                alive = self._rounds.alive(load)
                mine = [alarm for alarm in self._alarms if alarm.load == load.label]
                # Only one alarm of a load: the others are about the rounds before.
                answered |= any(self._again.answer(alarm, alive) for alarm in mine)
        return answered

    def _speed_is_due(self, load: Load) -> bool:
        """Speed has had less than its share, or rounds are to be measured in place of others.

        On a busy machine only these are.
        """
        if self._again.due(load.label):
            return True
        if self._is_busy_here():
            return False
        return self._spent["speed"] * (1 - SPEED_SHARE) < self._spent["quality"] * SPEED_SHARE

    def _is_busy_here(self) -> bool:
        """An alarm is about this machine or this group's servers; the group can do nothing about others."""
        alive = {one.name for one in self._own.plan.candidates} - self._whole.failed.keys()
        return any(alive.issuperset(alarm.deployments) for alarm in self._alarms)

    def _next_load(self) -> Load | None:
        """The load with the fewest rounds whose speeds are not settled, if another round ends in time.

        Loads on which advice depends come first until they have as many as an interval takes.
        """
        # Rounds of other servers, or of an earlier run, are none of these, nor are those that were set aside.
        made = {
            label: count - before - sum(number >= before for number in set_aside(self._own.speed, label))
            for label, count in self._rounds.rounds.items()
            for before in [self._before[label]]
        }
        loads = [
            load
            for load in self._own.plan.loads
            if made[load.label] < MOST_ROUNDS
            and self._rounds.estimate(load) < self._left
            and not speeds_settled(self._own, load, self._rounds.alive(load))
        ]
        plan = self._own.plan
        enough = least(plan.confidence)

        def rank(load: Load) -> tuple[bool, bool, int]:
            first = load == operators_load(self._own, load.context) and made[load.label] < enough
            return not self._again.due(load.label), not first, made[load.label]

        return min(loads, key=rank, default=None)

    def _next_unit(self, judgment: Judgment) -> Unit | None:
        """The next step of quality on which a verdict may depend, if it ends in time."""
        for unit in itertools.islice(self._units, self._kinds):
            names = self._candidates_for(unit, judgment)
            if names and self._evaluator.cost(unit, names) < self._left:
                return unit
        return None

    def _candidates_for(self, unit: Unit, judgment: Judgment) -> frozenset[str]:
        """Candidates that a unit is to be done on: those whose verdict may depend on it, and full attention.

        Full attention is included, since only pairs count. The first units of a kind are for all, and a few
        are for each whose verdict is open anywhere. Empty where it would be only for full attention.
        """
        plan, failed = self._own.plan, self._whole.failed
        done = self._done.get(_place(unit), 0)
        names = set()
        for verdict in judgment.verdicts:
            still = open_tests(verdict, plan.confidence)
            first = unit.kind == "memory" or done < self._units_for_all or (done < LEAST_UNITS and still)
            # No test decides beyond the model's context, but a score has its interval there.
            first = first or (unit.length in plan.beyond and done < least(plan.confidence))
            if first or (unit.measure, unit.length) in still:
                names.add(verdict.deployment)
        names &= {deployment.name for deployment in plan.candidates} - failed.keys()
        # Units that an earlier run measured on them are not repeated.
        lack = names.intersection(self._evaluator.due(unit, names))
        return frozenset(lack | {plan.full}) if lack else frozenset()

    def _progress(self, last: Measurement) -> None:
        self._listener.doing(f"{last.load}: round {self._rounds.rounds[last.load] + 1}")
