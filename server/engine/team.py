"""How many threads compute a step: as many as the machine really gives.

The threads of a step wait for each other some hundred times in it. Where another process takes one of their
cores, one of them is without a core for milliseconds at a time, and all others wait: two threads are then
slower than one. So a team that loses much of its time becomes smaller by one, and tries its old size again
later.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger("longspan.engine")

Result = TypeVar("Result")

LOST = 0.4
"""Share of the threads' time, without processor, above which one thread fewer computes faster.

Two threads on two cores lose 0.5 beside a process that takes one of them, and 0.1 to 0.3 to the server
process and a client that stream beside them."""

WINDOW = 0.1
"""Seconds of steps over which the share is taken; some ten turns of the operating system's scheduler."""

FIRST_TRIAL, LAST_TRIAL = 0.5, 4.0
"""Seconds until a smaller team tries more threads; each failed trial doubles them, any other halves them.

Trials cost a tenth of a second each, and a team that stays small after its neighbor has ended costs more."""


def watched(threads: int) -> Team | None:
    """A team whose size follows the machine; ``None`` where it can't.

    Threads that sleep while they wait (``OMP_WAIT_POLICY=PASSIVE``) lose time without a neighbor too.

    Args:
        threads: that compute.
    """
    sleeping = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    return Team(threads) if threads > 1 and not sleeping else None


class Team:
    """The threads that compute steps on a CPU.

    Args:
        most: threads where nothing else runs.
        resize: called with the number of threads that compute from now on.
        clock: in seconds.
        used: processor time of all threads of this process, in seconds.

    Attributes:
        size: threads that compute now.
    """

    def __init__(
        self,
        most: int,
        resize: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.perf_counter,
        used: Callable[[], float] = time.process_time,
    ) -> None:
        self._most, self._resize, self._clock, self._used = most, resize, clock, used
        self.size = most
        self._wall = self._busy = 0.0
        self._wait, self._trial_at, self._on_trial = FIRST_TRIAL, math.inf, False
        self._before, self._stride = most, 1

    def compute(self, step: Callable[[], Result]) -> Result:
        """Computes a step, and watches whether its threads had their cores."""
        wall, busy = self._clock(), self._used()
        try:
            return step()
        finally:
            now = self._clock()
            self._wall += now - wall
            self._busy += self._used() - busy
            if self._wall >= WINDOW:
                self._consider(1 - self._busy / (self.size * self._wall), now)
                self._wall = self._busy = 0.0

    def _consider(self, lost: float, now: float) -> None:
        log.debug("%d threads were without a core for %.0f%% of the time", self.size, 100 * lost)
        if self.size > 1 and lost > LOST:
            if self._on_trial:
                self._wait, self._stride = min(2 * self._wait, LAST_TRIAL), 1
                self._set(self._before)
            else:
                self._set(self.size - 1)
                log.info("another process takes a core: %d threads compute now; see --threads", self.size)
            self._trial_at, self._on_trial = now + self._wait, False
        elif self._on_trial:
            log.info("%d threads compute again", self.size)
            self._wait, self._stride = max(self._wait / 2, FIRST_TRIAL), 2 * self._stride
            self._trial_at, self._on_trial = now if self.size < self._most else math.inf, False
        elif now >= self._trial_at:
            self._before = self.size
            self._set(min(self.size + self._stride, self._most))
            self._on_trial = True

    def _set(self, size: int) -> None:
        self.size = size
        self._resize(size)
