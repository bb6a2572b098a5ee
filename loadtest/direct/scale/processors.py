"""Processors that tasks share evenly, and event loops that run on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import simpy

_NOTHING = 1e-9  # seconds, of rounding


class Task:
    """Work of one thread.

    Args:
        seconds: of a core, beside none that computes steps.
        speed: of a step beside another step, as a share of that; ``None`` of an event loop's work.
        done: comes when it is done.
    """

    __slots__ = ("done", "left", "speed")

    def __init__(self, seconds: float, speed: float | None, done: simpy.Event) -> None:
        self.left, self.speed, self.done = seconds, speed, done


class Processors:
    """Cores that any number of tasks share evenly (egalitarian processor sharing).

    Args:
        env: simulated time.
        cores: of the machine.

    Attributes:
        given: seconds of a core alone that tasks have had.
    """

    def __init__(self, env: simpy.Environment, cores: int) -> None:
        self._env, self._cores = env, cores
        self.given = 0.0
        self._tasks: list[Task] = []
        self._rates: list[float] = []
        self._since = env.now
        self._plans = 0

    def work(self, seconds: float, speed: float | None = None) -> Task:
        """Begins a task."""
        self._advance()
        task = Task(seconds, speed, self._env.event())
        self._tasks.append(task)
        self._plan()
        return task

    def cancel(self, task: Task) -> None:
        """Ends a task before its time; that it is done never comes."""
        self._advance()
        self._tasks.remove(task)
        self._plan()

    def _advance(self) -> None:
        passed, self._since = self._env.now - self._since, self._env.now
        for task, rate in zip(self._tasks, self._rates, strict=True):
            task.left -= passed * rate
            self.given += passed * rate

    def _plan(self) -> None:
        """Finds how fast each goes on, and when the first is done."""
        self._plans += 1
        count, steps = len(self._tasks), sum(task.speed is not None for task in self._tasks)
        busy = min(count, self._cores)
        self._rates = []
        for task in self._tasks:
            rate = busy / count
            if task.speed is not None and busy > 1:
                # Each of the others is as likely on another core.
                others = (busy - 1) / (self._cores - 1) * (steps - 1) / (count - 1)
                rate *= 1 - others * (1 - task.speed)
            self._rates.append(rate)
        if self._tasks:
            first = min(task.left / rate for task, rate in zip(self._tasks, self._rates, strict=True))
            then(self._env.timeout(max(0.0, first), self._plans), self._end)

    def _end(self, planned: simpy.Event) -> None:
        if planned.value != self._plans:
            return  # another task has come or gone since
        self._advance()
        done = [task for task in self._tasks if task.left < _NOTHING]
        self._tasks = [task for task in self._tasks if task.left >= _NOTHING]
        for task in done:
            task.done.succeed()
        self._plan()


class Loop:
    """A process of one thread that does one thing after the other, each taking processor time."""

    def __init__(self, processors: Processors) -> None:
        self._processors = processors
        self._left: deque[tuple[float, Callable[[], object]]] = deque()
        self._busy = False

    def do(self, seconds: float, call: Callable[[], object]) -> None:
        """Calls ``call`` once all that came before and so much processor time are done."""
        self._left.append((seconds, call))
        if not self._busy:
            self._go_on()

    def _go_on(self) -> None:
        self._busy = True
        while self._left:
            seconds, call = self._left.popleft()
            if seconds > 0:
                then(self._processors.work(seconds).done, partial(self._finish, call))
                return
            call()
        self._busy = False

    def _finish(self, call: Callable[[], object], done: simpy.Event) -> None:
        call()
        self._go_on()


def then(event: simpy.Event, call: Callable[[simpy.Event], None]) -> None:
    """Has an event that has not come yet call a function."""
    assert event.callbacks is not None
    event.callbacks.append(call)
