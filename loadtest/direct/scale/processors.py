"""Processors that tasks share evenly, and event loops that run on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import simpy

_NOTHING = 1e-9  # seconds, of rounding


class Speeds(NamedTuple):
    """How fast a step is, as a share of its speed on a core of its own beside none that computes steps.

    Attributes:
        beside: while all other cores compute steps.
        crowded: while all cores have several steps to compute in turn.
    """

    beside: float = 1.0
    crowded: float = 1.0


class Task:
    """Work of one thread.

    Args:
        seconds: of a core, at full speed.
        speeds: of a step; ``None`` of an event loop's work, which always has full speed.
        done: is called when it is done.
    """

    __slots__ = ("done", "left", "rate", "speeds")

    def __init__(self, seconds: float, speeds: Speeds | None, done: Callable[[], object]) -> None:
        self.left, self.speeds, self.done, self.rate = seconds, speeds, done, 0.0


class Processors:
    """Cores that any number of tasks share evenly (egalitarian processor sharing).

    Args:
        env: simulated time.
        cores: of the machine.

    Attributes:
        given: seconds at full speed that tasks have had.
        on_steps: seconds of cores that steps have had, at whatever speed.
    """

    def __init__(self, env: simpy.Environment, cores: int) -> None:
        self._env, self._cores = env, cores
        self.given = self.on_steps = 0.0
        self._tasks: list[Task] = []
        self._since = env.now
        self._plans = 0
        self._share = 0.0  # of a core, that each task has

    def work(self, seconds: float, done: Callable[[], object], speeds: Speeds | None = None) -> Task:
        """Begins a task."""
        self._advance()
        task = Task(seconds, speeds, done)
        self._tasks.append(task)
        self._plan()
        return task

    def cancel(self, task: Task) -> bool:
        """Ends a task before its time, so that it is never told as done.

        Returns:
            Whether there was time to: a task that is done at this very moment stays done, and is told.
        """
        if task not in self._tasks:
            return False
        self._advance()
        self._tasks.remove(task)
        self._plan()
        return True

    def _advance(self) -> None:
        passed, self._since = self._env.now - self._since, self._env.now
        busy = passed * self._share
        for task in self._tasks:
            task.left -= passed * task.rate
            self.given += passed * task.rate
            self.on_steps += 0.0 if task.speeds is None else busy

    def _plan(self) -> None:
        """Finds how fast each goes on, and when the first is done."""
        self._plans += 1
        if not self._tasks:
            return
        count, steps = len(self._tasks), sum(task.speeds is not None for task in self._tasks)
        busy = min(count, self._cores)
        # Each of the other tasks is as likely on another core.
        others = (busy - 1) / (self._cores - 1) * (steps - 1) / (count - 1) if busy > 1 else 0.0
        crowded = min(1.0, max(0.0, steps / self._cores - 1))
        self._share = busy / count
        for task in self._tasks:
            task.rate = self._share
            if task.speeds is not None:
                speed = 1 - others * (1 - task.speeds.beside)
                task.rate *= speed + crowded * (task.speeds.crowded - speed)
        first = min(task.left / task.rate for task in self._tasks)
        then(self._env.timeout(max(0.0, first), self._plans), self._end)

    def _end(self, planned: simpy.Event) -> None:
        if planned.value != self._plans:
            return  # another task has come or gone since
        self._advance()
        done = [task for task in self._tasks if task.left < _NOTHING]
        self._tasks = [task for task in self._tasks if task.left >= _NOTHING]
        self._plan()
        for task in done:
            task.done()


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
                self._processors.work(seconds, partial(self._finish, call))
                return
            call()
        self._busy = False

    def _finish(self, call: Callable[[], object]) -> None:
        call()
        self._go_on()


def then(event: simpy.Event, call: Callable[[simpy.Event], None]) -> None:
    """Has an event that has not come yet call a function."""
    assert event.callbacks is not None
    event.callbacks.append(call)
