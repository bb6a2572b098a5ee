"""A machine that is simulated: time passes only while something is measured on it."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from loadtest.measuring.rounds import Rounds
from loadtest.measuring.types import Load, Weather
from loadtest.measuring.weather import Observed

SHORT = Load(1024, 16, cached=True)
LONG = Load(8192, 16, cached=True)


@dataclass
class Machine:
    """Measurements on it take longer now and then."""

    noise: float = 0.03
    seed: int = 0
    now: float = 100.0
    foreign: float = 0.0
    drift: float = 0.0  # growth of all times per second
    spikes: dict[int, float] = field(default_factory=dict)  # by number of the visit
    disturbed: set[int] = field(default_factory=set)
    visits: int = 0
    seen: list = field(default_factory=list)

    def __post_init__(self):
        self.rng = random.Random(self.seed)

    def clock(self):
        return self.now

    def take(self, seconds):
        number, self.visits = self.visits, self.visits + 1
        slow = 2.0 if number in self.disturbed else 1.0
        took = seconds * math.exp(self.rng.gauss(0, self.noise)) * (1 + self.drift * (self.now - 100.0))
        took *= self.spikes.get(number, 1.0) * slow
        self.now += took
        return took

    def observe(self, pids, idle):
        self.seen.append((tuple(pids), frozenset(idle)))
        number, began = self.visits, self.now

        def so_far():
            share = 0.48 if number in self.disturbed else self.foreign
            return Observed(Weather(foreign=share), 2 * (self.now - began), "PID 7 python train.py")

        return so_far


@dataclass
class Simulated:
    machine: Machine
    tpot: float
    pid: int
    error: Exception | None = None
    fails_at: int = -1
    slow: Callable[[float], float] = lambda now: 1.0  # how many times slower it is at a time
    seeds: list = field(default_factory=list)

    @property
    def pids(self):
        return (self.pid,)

    def measure(self, load, seed):
        self.seeds.append(seed)
        if len(self.seeds) - 1 == self.fails_at:
            raise self.error
        took = self.machine.take(self.tpot * load.context / 1024 * self.slow(self.machine.now))
        return {"tpot": took, "output_rate": 1 / took}


def simulate(machine, *, rounds=0, budget=0.0, loads=(SHORT,), **tpots):
    targets = {name: Simulated(machine, tpot, 10 + n) for n, (name, tpot) in enumerate(tpots.items())}
    made = Rounds(targets, loads, clock=machine.clock, observe=machine.observe)
    for _ in range(rounds):
        for load in loads:
            made.step(load)
    if budget:
        made.run(budget, lambda load: False)
    return made
