"""Passes over cells, there and back, by the measuring core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.load.cell import Cell
from loadtest.load.result import Result
from loadtest.load.types import LoadTestError
from loadtest.measuring import weather
from loadtest.measuring.rounds import MOST_REPEATS, Rounds
from loadtest.measuring.types import Measurement
from loadtest.measuring.weather import Observe


class NotMeasuredError(LoadTestError):
    """A run could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """The load given to the measuring core: a pass over all cells, each with its own load."""

    label: str = "pass"


_PASS = _Pass()


def one_pass(
    found: Result,
    cells: Sequence[Cell],
    repeat: int,
    repeats: int,
    observe: Observe = weather.observe,
) -> None:
    """One pass over cells; each run gets its place in the whole and its weather.

    Two passes are a round of the core: one there, one back. With repeats, runs that other work on this
    machine disturbed are measured again at the pass's end; not where all of the last pass was disturbed,
    since this one will be too and would only take three times as long.

    Args:
        found: whose runs the cells add to.
        cells: to measure, in the order of the first pass.
        repeat: which pass, from 0.
        repeats: how many there will be.
        observe: how the machine is watched.

    Raises:
        StoppedError: Ctrl-C.
        NotMeasuredError: a run could not be made.
    """
    first = len(found.runs)

    def tell(last: Measurement) -> None:
        if last.error:  # such a target hangs, and each other cell would wait as long
            raise NotMeasuredError(last.error)
        run = found.runs[-1]
        run.attempt, run.disturbed = last.attempt, last.disturbed
        run.weather = None if math.isnan(last.weather.foreign) else last.weather

    for cell in cells:
        cell.prefix = f"{repeat + 1} of {repeats}: " if repeats > 1 else ""
    rounds = Rounds(
        {f"{number} {cell.name}": cell for number, cell in enumerate(cells)},
        [_PASS],
        tell=tell,
        observe=observe,
    )
    last = [run for run in found.runs if run.repeat == repeat - 1]
    hopeless = bool(last) and all(run.disturbed for run in last)
    again = MOST_REPEATS if repeats > 1 and not hopeless else 0
    try:
        rounds.half(_PASS, repeat // 2, repeat % 2, again)
    finally:
        for run in found.runs[first:]:
            run.repeat = repeat
