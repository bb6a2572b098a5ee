"""Measures with servers that are alive at the same time: rounds of speed and steps of quality by turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loadtest.compare.equal import equal_pairs
from loadtest.compare.evaluator import Evaluator
from loadtest.compare.judge import judge
from loadtest.compare.plan import Material
from loadtest.compare.stopping import open_tests, speeds_settled
from loadtest.compare.types import Comparison, Judgment
from loadtest.compare.units import Unit
from loadtest.deployment import Deployment
from loadtest.measuring.again import Again
from loadtest.measuring.busy import Alarm, alarms, sentence, set_aside
from loadtest.measuring.rounds import Progress, Rounds
from loadtest.measuring.served import Served
from loadtest.measuring.statistics import LEAST
from loadtest.measuring.types import Load
from longspan import Client

SPEED_SHARE = 0.45
"""Of the time that goes to speed while both speed and quality lack evidence."""

LONGEST_STEP = 0.25
"""Of the time, for one round: on a busy machine the first could take all of it before that is known."""

MOST_ROUNDS = 40
"""Of a load, with the same servers: an interval that is still wide then would take hours to become narrow."""

PATIENCE = 10.0
"""Times the duration that is expected after which a request is given up: its server hangs."""

LEAST_PATIENCE = 120.0
"""Seconds that any request is given: an expectation may be of a quieter minute."""

LEAST_UNITS = 3
"""Contexts of each task and length, and slices of text, before what they tell may be called settled."""


class FullFailedError(RuntimeError):
    """Full attention's server failed, and nothing can be compared without it; the message says how."""


@dataclass(frozen=True, slots=True)
class Listener:
    """What is called while a run goes on.

    Attributes:
        doing: called with what is under way, in a few words.
        judged: called with the judgment whenever there is more of it.
    """

    doing: Callable[[str], None]
    judged: Callable[[Judgment], None]


def fail(comparison: Comparison, reasons: Mapping[str, str]) -> None:
    """Notes candidates that can't be measured any more.

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
    """Servers that are alive at the same time, and what is still to be measured on them."""

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
    ) -> None:
        self._whole, self._targets, self._clients = whole, targets, clients
        # It has the whole comparison's rows, but only this group's candidates are missing from it.
        self._own = replace(whole, plan=replace(whole.plan, candidates=tuple(part)))
        self._end, self._listener, self._clock = end, listener, clock
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
        self._again = Again(self._own.speed)
        self._evaluator = Evaluator(
            self._own,
            clients[plan.full],
            text=material.text,
            prose=material.prose,
            own=material.own,
        )
        self._units = self._evaluator.units()
        # What is left to do never ends; of as many units as this, all kinds of it have been seen.
        self._kinds = 2 * (len(plan.contexts) * (len(plan.tasks) + 2) + len(material.own))

    def measure(self) -> None:
        """Rounds and units by turns until nothing is open or the time is up."""
        while True:
            judgment = self._judge()
            load, unit = self._next_load(), self._next_unit(judgment)
            if unit is None:
                if load is None:
                    return
                self._measure(load)
                continue
            while load is not None and self._speed_is_due():
                self._measure(load)
                load = self._next_load()
            # The rounds took time of it; what is cut off would have to be done again.
            if self._evaluator.cost(unit) < self._left:
                self._evaluate(unit)

    @property
    def _left(self) -> float:
        return self._end - self._clock()

    def _measure(self, load: Load) -> None:
        began = self._clock()
        self._allow(self._rounds.estimate(load))
        self._rounds.step(load, min(self._end, began + self._longest_step))
        fail(self._whole, {name: reason for (_, name), reason in self._rounds.failed.items()})
        self._spent["speed"] += self._clock() - began

    def _evaluate(self, unit: Unit) -> None:
        self._listener.doing(unit.label)
        began = self._clock()
        whole, own = self._whole, self._own
        alive = {name: client for name, client in self._clients.items() if name not in whole.failed}
        place = (unit.task or unit.kind, unit.length)
        self._allow(self._evaluator.cost(unit) if place in self._done else 0.0)
        rows = self._evaluator.run(unit, alive, self._end)
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
        """What the whole comparison says."""
        whole = self._whole
        now = self._clock()
        whole.spent += now - self._booked
        self._booked = now
        pairs = equal_pairs(whole)
        found = alarms(whole.speed, pairs)
        if self._set_aside(found):
            found = alarms(whole.speed, pairs)
        whole.busy = sentence(found, whole.speed)
        judgment = judge(whole)
        self._listener.judged(judgment)
        return judgment

    def _set_aside(self, found: Sequence[Alarm]) -> bool:
        """Has rounds measured again that alarms call for, where there is time for as many as that takes."""
        answered = set()
        for load in self._own.plan.loads:
            if LEAST * self._rounds.estimate(load) < self._left:
                alive = self._rounds.alive(load)
                mine = [alarm for alarm in found if alarm.load == load.label]
                if any(
                    self._again.answer(alarm, alive) for alarm in mine
                ):  # the first; the others are old then
                    answered.add(load)
        return bool(answered)

    def _speed_is_due(self) -> bool:
        """Speed has had less than its share; on a busy machine that is only for rounds in place of others."""
        due = any(self._again.due(load.label) for load in self._own.plan.loads)
        if self._whole.busy and not due and self._is_busy_here():
            return False
        return self._spent["speed"] * (1 - SPEED_SHARE) < self._spent["quality"] * SPEED_SHARE

    def _is_busy_here(self) -> bool:
        """An alarm is about the machine or servers that this group has; it can do nothing about others."""
        alive = {one.name for one in self._own.plan.candidates} - self._whole.failed.keys()
        found = alarms(self._own.speed, equal_pairs(self._own))
        return any(alive.issuperset(alarm.deployments) for alarm in found)

    def _next_load(self) -> Load | None:
        """The load with the fewest rounds whose speeds are not settled, if another round ends in time."""
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
        return min(loads, key=lambda load: (not self._again.due(load.label), made[load.label]), default=None)

    def _next_unit(self, judgment: Judgment) -> Unit | None:
        """The next step of quality on which a verdict may depend, if it ends in time."""
        plan = self._own.plan
        names = {deployment.name for deployment in plan.candidates} - self._whole.failed.keys()
        open_now = {
            place
            for verdict in judgment.verdicts
            if verdict.deployment in names
            for place in open_tests(verdict, plan.confidence)
        }
        for unit in itertools.islice(self._units, self._kinds):
            done = self._done.get((unit.task or unit.kind, unit.length), 0)
            needed = unit.kind == "memory" or done < LEAST_UNITS or (unit.measure, unit.length) in open_now
            if needed and self._evaluator.cost(unit) < self._left:
                return unit
        return None

    def _progress(self, progress: Progress) -> None:
        self._listener.doing(f"{progress.last.load}: round {progress.rounds[progress.last.load] + 1}")
