"""Measures a comparison: rounds of speed and steps of quality by turns, until the evidence suffices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from loadtest.compare.equal import equal_pairs, equal_work
from loadtest.compare.gains import deciding_figure
from loadtest.compare.judge import judge
from loadtest.compare.plan import Material, PlanError
from loadtest.compare.preflight import Found, try_all
from loadtest.compare.stopping import open_tests
from loadtest.compare.types import Comparison, Judgment
from loadtest.deployment import Deployment
from loadtest.evaluation.evaluator import Evaluator
from loadtest.evaluation.pairs import OWN
from loadtest.evaluation.units import Unit
from loadtest.measuring.analysis import series, settled
from loadtest.measuring.busy import EqualPair, busy
from loadtest.measuring.requests import reason
from loadtest.measuring.rounds import Progress, Rounds
from loadtest.measuring.served import Served
from loadtest.measuring.servers import OpenError, groups, open_all
from loadtest.measuring.types import Load
from loadtest.statistics import least
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
    """Who is told of a run.

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
        listener: told of all that happens.
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
        _Group(comparison, found, material, part, end, listener, clock).run()


def speeds_settled(comparison: Comparison, load: Load, alive: Sequence[str]) -> bool:
    """More rounds of a load would tell nothing that matters of any variant.

    Equal work can't be told apart, and need not; but it too takes as many rounds as an interval does, else
    full attention itself has no figures, and nobody knows whether the machine is quiet.

    Args:
        comparison: with the rows.
        load: of whose rounds the question is.
        alive: candidates that can be measured under it.
    """
    figure, plan = deciding_figure(load), comparison.plan
    full, confidence = plan.candidates[0].name, plan.confidence
    if len(series(comparison.speed, full, load.label, figure)) < least(confidence):
        return False
    others = [name for name in alive if name != full and not equal_work(comparison, name, load, figure)]
    return all(
        settled(comparison.speed, name, full, load.label, figure, plan.margins.speed, confidence)
        for name in others
    )


class _Group:
    """Servers that are alive at the same time: full attention and as many others as fit into memory."""

    def __init__(
        self,
        whole: Comparison,
        found: Found,
        material: Material,
        part: Sequence[Deployment],
        end: float,
        listener: Listener,
        clock: Callable[[], float],
    ) -> None:
        self._whole, self._found, self._material, self._part = whole, found, material, part
        # It has the whole comparison's rows, but only this group's candidates are missing from it.
        self._own = replace(whole, plan=replace(whole.plan, candidates=tuple(part)))
        self._end, self._listener, self._clock = end, listener, clock
        self._full = part[0].name
        self._begun = bool(whole.speed or whole.answers or whole.text or whole.memory)
        self._booked = clock()
        self._longest_step = LONGEST_STEP * (end - self._booked)
        self._spent = {"speed": 0.0, "quality": 0.0}
        self._done: dict[tuple[str, int], int] = {}
        self._before: dict[str, int] = {}
        self._targets: Mapping[str, Served] = {}
        self._clients: Mapping[str, Client] = {}

    def run(self) -> None:
        self._listener.doing(f"starting {len(self._part)} servers")
        try:
            with ExitStack() as stack:
                arguments = self._own.plan.arguments
                targets = stack.enter_context(open_all(self._part, arguments, self._found.kv_each))
                clients = {
                    name: stack.enter_context(Client(target.host, target.port))
                    for name, target in targets.items()
                }
                for name, client in clients.items():
                    attention = client.model_info().attention
                    self._whole.running[name] = {
                        "kernel": attention.kernel,
                        "reason": attention.reason,
                        "options": dict(attention.options),
                    }
                self._measure(targets, clients)
        except OpenError as error:
            if not self._begun:
                raise PlanError(str(error)) from error
            # The whole group is not measured, for the sake of those that are; a later run may.
            self._fail(error.reasons)
        except LongspanError as error:
            raise FullFailedError(f"{self._full} failed while it was measured: {reason(error)}") from error

    def _allow(self, expected: float) -> None:
        """Gives requests a time after which their server hangs; 0 is expected where nothing is known."""
        left = self._end - self._clock()
        seconds = max(LEAST_PATIENCE, min(left, PATIENCE * expected) if expected else left)
        for target in self._targets.values():
            target.allow(seconds)
        for client in self._clients.values():
            client.timeout = seconds

    def _measure(self, targets: dict[str, Served], clients: dict[str, Client]) -> None:
        plan = self._own.plan
        self._targets, self._clients = targets, clients
        self._allow(0.0)
        rounds: Rounds[Load] = Rounds(
            targets,
            plan.loads,
            seed=plan.seed,
            measurements=self._own.speed,
            tell=self._progress,
            clock=self._clock,
        )
        self._before = rounds.rounds
        evaluator = Evaluator(
            self._own,
            clients[self._full],
            text=self._material.text,
            prose=self._material.prose,
            own=self._material.own,
        )
        units = evaluator.units()
        while True:
            judgment = self._judge()
            left = self._end - self._clock()
            load = self._next_load(rounds, left)
            waiting = self._next_unit(units, evaluator, judgment, left)
            if load is None and waiting is None:
                return
            while load is not None and (waiting is None or self._speed_is_due()):
                began = self._clock()
                self._allow(rounds.estimate(load))
                rounds.step(load, min(self._end, began + self._longest_step))
                self._fail({name: reason for (_, name), reason in rounds.failed.items()})
                self._spent["speed"] += self._clock() - began
                load = self._next_load(rounds, self._end - self._clock())
                if waiting is None:
                    break
            # The rounds took time of it; what is cut off would have to be done again.
            if waiting is not None and evaluator.cost(waiting) < self._end - self._clock():
                self._evaluate(evaluator, waiting, clients)

    def _evaluate(self, evaluator: Evaluator, unit: Unit, clients: Mapping[str, Client]) -> None:
        self._listener.doing(unit.label)
        began = self._clock()
        alive = {name: client for name, client in clients.items() if name not in self._own.failed}
        place = (unit.task or unit.kind, unit.length)
        self._allow(evaluator.cost(unit) if place in self._done else 0.0)
        rows = evaluator.run(unit, alive, self._end)
        rows.add_to(self._own)
        self._share()
        self._fail(rows.failed)
        self._done[place] = self._done.get(place, 0) + 1
        self._spent["quality"] += self._clock() - began

    def _judge(self) -> Judgment:
        """What the whole comparison says."""
        whole = self._whole
        now = self._clock()
        whole.spent += now - self._booked
        self._booked = now
        pairs = [EqualPair(*pair) for pair in equal_pairs(whole)]
        whole.busy = busy(whole.speed, pairs) if whole.speed else ""
        judgment = judge(whole)
        self._listener.judged(judgment)
        return judgment

    def _share(self) -> None:
        """Gives the whole comparison this group's rows, at once: who interrupts a run keeps them."""
        whole, own = self._whole, self._own
        whole.answers, whole.text, whole.memory = own.answers, own.text, own.memory

    def _speed_is_due(self) -> bool:
        """Speed has had less than its share of the time; on a busy machine quality goes first."""
        if self._whole.busy:
            return False
        return self._spent["speed"] * (1 - SPEED_SHARE) < self._spent["quality"] * SPEED_SHARE

    def _next_load(self, rounds: Rounds[Load], left: float) -> Load | None:
        """The load with the fewest rounds whose speeds are not settled, if another round ends in time."""
        # Rounds of other servers, or of an earlier run, are none of these.
        made = {label: count - self._before[label] for label, count in rounds.rounds.items()}
        loads = [
            load
            for load in self._own.plan.loads
            if made[load.label] < MOST_ROUNDS
            and rounds.estimate(load) < left
            and not self._settled(load, rounds)
        ]
        return min(loads, key=lambda load: made[load.label], default=None)

    def _settled(self, load: Load, rounds: Rounds[Load]) -> bool:
        return speeds_settled(self._own, load, rounds.alive(load))

    def _next_unit(
        self, units: Iterator[Unit], evaluator: Evaluator, judgment: Judgment, left: float
    ) -> Unit | None:
        """The next step of quality on which something depends, if it ends in time."""
        plan = self._own.plan
        kinds = len(plan.contexts) * (len(plan.tasks) + 2) + len(self._material.own)
        for _ in range(2 * kinds):  # what is left goes on for ever, so all kinds of it have been seen by then
            unit = next(units, None)
            if unit is None:
                return None
            if self._matters(unit, judgment) and evaluator.cost(unit) < left:
                return unit
        return None

    def _matters(self, unit: Unit, judgment: Judgment) -> bool:
        """A verdict on a variant of this group may depend on it."""
        if unit.kind == "memory" or self._done.get((unit.task or unit.kind, unit.length), 0) < LEAST_UNITS:
            return True
        asked = "text" if unit.kind == "text" else "own" if unit.task == OWN else "tasks"
        names = {deployment.name for deployment in self._part}
        open_now = {
            place
            for verdict in judgment.verdicts
            if verdict.deployment in names and verdict.deployment not in self._own.failed
            for place in open_tests(verdict, self._own.plan.confidence)
        }
        return (asked, unit.length) in open_now

    def _fail(self, failed: Mapping[str, str]) -> None:
        if self._full in failed:
            raise FullFailedError(f"{self._full} failed while it was measured: {failed[self._full]}")
        self._own.failed.update(failed)  # the dict is the whole comparison's

    def _progress(self, progress: Progress) -> None:
        self._listener.doing(f"{progress.last.load}: round {progress.rounds[progress.last.load] + 1}")
