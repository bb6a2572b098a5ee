"""Measures a comparison: rounds of speed and steps of quality by turns, until the evidence suffices."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from loadtest.compare.equal import equal_pairs, equal_work
from loadtest.compare.evaluator import Evaluator
from loadtest.compare.gains import deciding_figure
from loadtest.compare.judge import judge
from loadtest.compare.plan import Material, PlanError
from loadtest.compare.preflight import Found, try_all
from loadtest.compare.stopping import open_tests
from loadtest.compare.types import Comparison, Judgment
from loadtest.compare.units import Unit
from loadtest.deployment import Deployment
from loadtest.measuring.analysis import series, settled
from loadtest.measuring.busy import busy
from loadtest.measuring.requests import reason
from loadtest.measuring.rounds import Progress, Rounds
from loadtest.measuring.served import Served
from loadtest.measuring.servers import OpenError, groups, open_all
from loadtest.measuring.statistics import least
from loadtest.measuring.types import Load
from longspan import Client, LongspanError

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


def run(
    comparison: Comparison,
    found: Found,
    material: Material,
    deadline: float,
    listener: Listener,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Fills a comparison.

    Args:
        comparison: with the plan that ``preflight.look`` completed; what it has is not measured again.
        found: by ``preflight.look``.
        material: what is measured on.
        deadline: time of ``clock`` at which nothing more begins.
        listener: called with all that happens.
        clock: in seconds.

    Raises:
        PlanError: servers did not start; names all of them. Nothing was measured with them.
        FullFailedError: full attention can't be measured any more.
    """
    parts = groups(comparison.plan.candidates, max(2, found.at_once))
    if len(parts) > 1:
        try_all(parts, comparison.plan.arguments, found.kv_each, listener.doing)
    for number, part in enumerate(parts):
        now = clock()
        if now >= deadline:
            return  # servers that nothing can be asked any more are not started
        end = now + (deadline - now) / (len(parts) - number)
        _serve(comparison, found, material, part, end, listener, clock)


def _serve(
    comparison: Comparison,
    found: Found,
    material: Material,
    part: Sequence[Deployment],
    end: float,
    listener: Listener,
    clock: Callable[[], float],
) -> None:
    """Serves full attention and as many others as fit into memory, and measures them until ``end``."""
    begun = bool(comparison.speed or comparison.answers or comparison.text or comparison.memory)
    listener.doing(f"starting {len(part)} servers")
    try:
        with ExitStack() as stack:
            targets = stack.enter_context(open_all(part, comparison.plan.arguments, found.kv_each))
            clients = {
                name: stack.enter_context(Client(target.host, target.port))
                for name, target in targets.items()
            }
            for name, client in clients.items():
                attention = client.model_info().attention
                comparison.running[name] = {
                    "kernel": attention.kernel,
                    "reason": attention.reason,
                    "options": dict(attention.options),
                }
            _Group(comparison, material, part, targets, clients, end, listener, clock).measure()
    except OpenError as error:
        if not begun:
            raise PlanError(str(error)) from error
        # The whole group is not measured, for the sake of those that are; a later run may.
        _fail(comparison, error.reasons)
    except LongspanError as error:
        full = comparison.plan.full
        raise FullFailedError(f"{full} failed while it was measured: {reason(error)}") from error


def _fail(comparison: Comparison, reasons: Mapping[str, str]) -> None:
    """Candidates that can't be measured any more, by name: why.

    Raises:
        FullFailedError: full attention is among them.
    """
    full = comparison.plan.full
    if full in reasons:
        raise FullFailedError(f"{full} failed while it was measured: {reasons[full]}")
    comparison.failed.update(reasons)


def speeds_settled(comparison: Comparison, load: Load, alive: Sequence[str]) -> bool:
    """More rounds of a load would tell nothing that matters of any variant.

    Equal work can't be told apart, and need not; but it too takes as many rounds as an interval does, else
    full attention itself has no figures, and whether the machine is quiet is not known.

    Args:
        comparison: with the rows.
        load: of whose rounds the question is.
        alive: candidates that can be measured under it.
    """
    figure, plan = deciding_figure(load), comparison.plan
    full, confidence = plan.full, plan.confidence
    if len(series(comparison.speed, full, load.label, figure)) < least(confidence):
        return False
    others = [name for name in alive if name != full and not equal_work(comparison, name, load, figure)]
    return all(
        settled(comparison.speed, name, full, load.label, figure, plan.margins.speed, confidence)
        for name in others
    )


class _Group:
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
        self._evaluator = Evaluator(
            self._own, clients[plan.full], text=material.text, prose=material.prose, own=material.own
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
        _fail(self._whole, {name: reason for (_, name), reason in self._rounds.failed.items()})
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
        _fail(whole, rows.failed)
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
        whole.busy = busy(whole.speed, equal_pairs(whole))
        judgment = judge(whole)
        self._listener.judged(judgment)
        return judgment

    def _speed_is_due(self) -> bool:
        """Speed has had less than its share of the time; on a busy machine quality goes first."""
        if self._whole.busy:
            return False
        return self._spent["speed"] * (1 - SPEED_SHARE) < self._spent["quality"] * SPEED_SHARE

    def _next_load(self) -> Load | None:
        """The load with the fewest rounds whose speeds are not settled, if another round ends in time."""
        # Rounds of other servers, or of an earlier run, are none of these.
        made = {label: count - self._before[label] for label, count in self._rounds.rounds.items()}
        loads = [
            load
            for load in self._own.plan.loads
            if made[load.label] < MOST_ROUNDS
            and self._rounds.estimate(load) < self._left
            and not speeds_settled(self._own, load, self._rounds.alive(load))
        ]
        return min(loads, key=lambda load: made[load.label], default=None)

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
