"""Processors that tasks share evenly, and event loops that run on them."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from functools import partial

import simpy


class Processors:
    """Cores that any number of tasks of one thread share evenly (egalitarian processor sharing).

    Args:
        env: simulated time.
        cores: of the machine.
        beside: speed of a core while all others compute too, as a share of its speed alone: cores share
            caches and memory, and two may be threads of one.

    Attributes:
        given: processor time that tasks have had, in seconds of a core that computes alone.
    """

    def __init__(self, env: simpy.Environment, cores: int, beside: float = 1.0) -> None:
        self._env, self._cores, self._beside = env, cores, beside
        self.given = 0.0
        self._tasks: list[tuple[float, int, simpy.Event]] = []
        self._order = itertools.count()
        self._each = 0.0  # what a task that was there from the beginning would have had
        self._since = env.now
        self._plans = 0

    def rate(self, tasks: int) -> float:
        """Seconds of a core alone that each of so many tasks gets in a second."""
        busy = min(tasks, self._cores)
        speed = 1 - (1 - self._beside) * (busy - 1) / max(1, self._cores - 1)
        return speed * busy / tasks

    def work(self, seconds: float) -> simpy.Event:
        """Begins a task of so much processor time; the event tells its end."""
        self._advance()
        done = self._env.event()
        heapq.heappush(self._tasks, (self._each + seconds, next(self._order), done))
        self._plan()
        return done

    def cancel(self, done: simpy.Event) -> None:
        """Ends a task before its time; its event never comes."""
        self._advance()
        self._tasks = [task for task in self._tasks if task[2] is not done]
        heapq.heapify(self._tasks)
        self._plan()

    def _advance(self) -> None:
        if self._tasks:
            each = (self._env.now - self._since) * self.rate(len(self._tasks))
            self._each += each
            self.given += each * len(self._tasks)
        self._since = self._env.now

    def _plan(self) -> None:
        self._plans += 1
        if self._tasks:
            left = max(0.0, self._tasks[0][0] - self._each)
            then(self._env.timeout(left / self.rate(len(self._tasks)), self._plans), self._end)

    def _end(self, planned: simpy.Event) -> None:
        if planned.value != self._plans:
            return  # another task has come or gone since
        self._advance()
        self._each = max(self._each, self._tasks[0][0])
        while self._tasks and self._tasks[0][0] <= self._each:
            heapq.heappop(self._tasks)[2].succeed()
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
                then(self._processors.work(seconds), partial(self._finish, call))
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
