"""Runs worlds: with faults, then with requests only, then until nothing is left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from server.engine import core as core_module
from server.engine import division, pace, scheduler
from server.engine.ipc import process as process_module
from tests.engine.simulation.world import DRAIN, NONE, Faults, World


class Result(NamedTuple):
    """What a world has been through.

    Attributes:
        ticks: in all.
        ended: requests that ended by themselves.
        longest: most ticks that one of them took.
        deaths: of engines.
        preemptions: of sequences.
        given_up: steps that were given up halfway.
        raised: passes that raised.
    """

    ticks: int
    ended: int
    longest: int
    deaths: int
    preemptions: int
    given_up: int
    raised: int


@contextmanager
def pretended_time() -> Iterator[None]:
    """Worlds replace the engine's clock and when a prompt holds up nothing; these are put back.

    Their many errors are not logged.
    """
    short, quiet, first = division.SHORT, scheduler.QUIET, pace.FIRST
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        core_module.time = process_module.time = time
        division.SHORT, scheduler.QUIET, pace.FIRST = short, quiet, first


def simulate(seed: int, ticks: int) -> Result:
    """One world.

    Args:
        seed: of all that happens.
        ticks: half of them with faults, half with requests only; those until all has drained come on top.

    Raises:
        AssertionError: with the seed and the tick, and how to see it again.
    """
    return asyncio.run(_simulate(seed, ticks))


async def _simulate(seed: int, ticks: int) -> Result:
    with pretended_time():
        world = World(seed)
        try:
            _run(world, ticks)
        except Exception as error:
            again = f"python -m tests.engine.simulation {seed} {ticks}"
            raise AssertionError(f"seed {seed}, tick {world.tick}: {error!r}; again: {again}") from error
    preemptions = world.preemptions + world.core.scheduler.preemptions
    given_up = world.given_up + world.runner.given_up
    raised = world.raised + world.runner.raised
    return Result(world.tick, world.ended, world.longest, world.deaths, preemptions, given_up, raised)


def _run(world: World, ticks: int) -> None:
    load = 0.05 if world.idle else world.rng.choice([0.05, 0.2, 0.6])
    for tick in range(ticks):
        if tick == ticks // 2:
            world.calm()
        world.step(load, Faults() if tick < ticks // 2 else NONE)
    limit = world.tick + DRAIN
    while not world.settled():
        assert world.tick < limit, "it does not drain"
        world.step(0.0)
    world.check_empty()
