"""Both processes of a server in one, tick by tick: the real ones but for model, sockets and time."""

from __future__ import annotations

import math
import os
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from server.engine import core as core_module
from server.engine import division, pace
from server.engine import scheduler as scheduler_module
from server.engine.core import EngineCore
from server.engine.division import PATIENCE
from server.engine.ipc import process as process_module
from server.engine.ipc.link import EngineClient
from server.engine.ipc.process import Engine
from server.engine.ipc.pulse import Pulse, open_memory
from server.engine.ipc.wire import Frames, LostFrameError
from server.engine.scheduler import Scheduled
from server.messages import Beams, Sampling, Submit
from server.settings import Settings
from tests.engine.simulation.channel import Direction, EngineWire, ServerWire, TickOverError
from tests.engine.simulation.oracle import VOCABULARY
from tests.engine.simulation.reader import Reader
from tests.engine.simulation.router import Index
from tests.engine.simulation.runner import Clock, FakeRunner, Rule

LONGEST = 64
"""Tokens of a sequence."""

IN_FLIGHT = 16
"""Sequences that are admitted at a time, those waiting included."""

DRAIN = 2 * IN_FLIGHT * LONGEST + 100
"""The most ticks in which all that is admitted ends: if need be one after another, a token a tick, each begun
twice; and messages on their way."""

LEVELS = 2
"""Priorities are from 0 to this."""

_LEAST_TICK = 0.00225  # seconds of a step of one token, see FakeRunner
_LONGEST_DELAY = 40  # ticks
_READERS_PATIENCE = 40  # ticks that a reader may stall before its request is ended


class Faults(NamedTuple):
    """Chances per tick, or per reader and tick."""

    stall: float = 0.01
    abort: float = 0.004
    storm: float = 0.004
    death: float = 0.002
    lost: float = 0.001
    delay: float = 0.02
    deadline: float = 0.1  # per request


NONE = Faults(*[0.0] * len(Faults._fields))


@cache
def _settings() -> Settings:
    return Settings()


class World:
    """A server, its engine and its clients; all is drawn from the seed.

    Attributes:
        tick: ticks so far.
        longest: most ticks that an undisturbed request took.
        ended: undisturbed requests that got all of their answer.
        deaths: of engines.
        idle: few requests come.
        preemptions: in engines that have died.
        given_up: steps given up in these.
        raised: passes that raised in these.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.clock = Clock()
        self.tick = self.longest = self.ended = self.deaths = self.preemptions = 0
        self.given_up = self.raised = 0
        page_size = rng.choice([1, 2, 4, 8])
        rule = Rule(None) if rng.random() < 0.7 else Rule(rng.randint(4, 20), rng.randint(0, 5))
        self._pages, self._page_size, self._rule = rng.randint(60, 240) // page_size + 2, page_size, rule
        self.context = min(LONGEST, (self._pages - 1) * page_size)
        self._aging = rng.choice([None, 0.1, 0.4])
        self._priorities = 0 if self._aging is None and rng.random() < 0.5 else LEVELS
        max_running = rng.randint(1, 8)
        self._sizes = {
            "max_running": max_running,
            "max_batch_tokens": max_running + rng.randint(0, 40),
            "max_prefills": rng.randint(1, 4),
            "prompt_step_seconds": rng.choice([None, 0.01, 0.05]),
            "aging_seconds": self._aging,
            "prefix_cache": rng.random() < 0.7,
            "ahead": rng.random() < 0.5,
            "arrivals": rng.choice([None, 0]),
        }
        # In some worlds there is little to do, and a prompt by itself is one that holds up nothing.
        self.idle = rng.random() < 0.25
        if self.idle:
            self._sizes |= {"prompt_step_seconds": 0.01, "arrivals": 0, "max_batch_tokens": max_running + 40}
        self._documents = [[rng.randrange(VOCABULARY) for _ in range(LONGEST)] for _ in range(3)]
        self._readers: list[Reader] = []
        self._start()

    @property
    def bound(self) -> float:
        """The most ticks that a request may take.

        Only those that came before it go before it, or soon enough after to have the higher priority still.
        """
        if self._aging is None and self._priorities:
            return math.inf
        overtaken = 0.0 if self._aging is None else self._priorities * self._aging / _LEAST_TICK
        return overtaken + DRAIN

    def _start(self) -> None:
        """A new engine process and its link."""
        core_module.time = process_module.time = self.clock
        if self.idle:
            division.SHORT, scheduler_module.QUIET, pace.FIRST = 0, 0.0, pace.LEAST
        self.to_engine, self.to_server = (Direction(self.rng, 2) for _ in range(2))
        self.client = EngineClient(_settings(), Path())
        self.client._wire = ServerWire(self.to_engine)
        self.client.state = "ready"
        self._frames = Frames()
        self._wire = EngineWire(self.to_engine, self.to_server)
        memory = open_memory()
        self._engine = Engine(self._wire, Pulse(memory))
        os.close(memory)
        place = self._pages, self._page_size, self._rule, self.context
        self.runner = FakeRunner(*place, self.clock, self.rng)
        sizes: dict[str, Any] = self._sizes
        self.core = EngineCore(
            self.runner,
            context_length=self.context,
            check_integrity=True,
            **sizes,
        )
        self.core.scheduler._clock = self.clock.monotonic
        self.index = Index(self._page_size)
        self.core.kv.tell(self.index)
        self._schedule = self.core.scheduler.schedule
        self.core.scheduler.schedule = self._watched
        self._passed_over: dict[int, int] = {}

    def _watched(self) -> list[Scheduled]:
        """The scheduler's choice: the most urgent running sequence goes on, but for a few steps in a row."""
        scheduled = self._schedule()
        assert scheduled, "nothing is scheduled"
        leader = min(self.core.scheduler.running, key=lambda s: s.urgency)
        missed = 0 if any(s.head is leader for s, _ in scheduled) else self._passed_over.get(leader.id, 0) + 1
        assert missed <= PATIENCE, f"sequence {leader.id} is passed over {missed} times in a row"
        self._passed_over = {leader.id: missed}
        return scheduled

    def step(self, arrivals: float, faults: Faults = NONE) -> None:
        """One tick: the engine's loop once, then the server's."""
        self.tick += 1
        rng = self.rng
        if rng.random() < arrivals:
            self._submit(rng.randint(0, self._priorities), faults.deadline)
        if rng.random() < faults.storm:
            for _ in range(8):
                self._submit(self._priorities, faults.deadline)
        for direction in (self.to_engine, self.to_server):
            direction.tick()
            if rng.random() < faults.delay:
                direction.longest = rng.choice([0, 2, 5, _LONGEST_DELAY])
            direction.drop = direction.drop or rng.random() < faults.lost
        self._wire.begin_tick()
        try:
            self._engine.run(self.core)
        except TickOverError:
            pass
        except LostFrameError:
            self._die()
        try:
            self._deliver()
        except LostFrameError:
            self._die()
        self._read(faults)
        if rng.random() < faults.death:
            self._die()
        findable = self.core.kv.pool._page_of
        assert self.index.findable == findable.keys(), "a router knows other pages"
        if self.tick % 16 == 0:
            self.runner.check(findable, self.index.prompts)
        if not self.core.has_work and not any(reader.open for reader in self._readers):
            assert self.core.kv.pool.held == 0

    def settled(self) -> bool:
        """Whether nothing is left to do."""
        return not self._readers and not self.core.has_work

    def check_empty(self) -> None:
        """Nothing is left of any request."""
        self.core.scheduler.check_integrity()
        assert self.core.kv.pool.held == 0
        assert not self.client._streams

    def calm(self) -> None:
        """Faults end. One more message each way shows whether any was lost before."""
        for direction in (self.to_engine, self.to_server):
            direction.longest, direction.drop = 1, False
        for reader in self._readers:
            reader.stalled = 0
        self._submit(0, always=True)

    def _submit(self, priority: int, deadlines: float = 0.0, *, always: bool = False) -> None:
        rng = self.rng
        samples = rng.choice([1, 1, 1, 1, 3])
        if sum(reader.open for reader in self._readers) + samples > IN_FLIGHT and not always:
            return
        most = self.context - 1 if rng.random() < 0.1 else min(self.context - 1, 20)
        length = rng.randint(1, most)
        shared = rng.randint(0, length)
        prompt = rng.choice(self._documents)[:shared]
        prompt = prompt + [rng.randrange(VOCABULARY) for _ in range(length - shared)]
        ids, most = self.client.new_ids(samples), rng.randint(1, min(20, self.context - length))
        if beams := self._beams(ids, length, most):
            ids = ids[:1]
        requests = [
            Submit(
                id=i,
                prompt=prompt,
                sampling=Sampling(seed=rng.randrange(1 << 40)),
                max_tokens=most,
                min_tokens=rng.choice([0, 0, 3]),
                stop_token_ids=rng.sample(range(VOCABULARY), rng.choice([0, 0, 2])),
                prompt_logprobs=None if beams else rng.choice([None, None, None, 1]),
                priority=priority,
                beams=beams,
                leader=None if i == ids[0] else ids[0],
            )
            for i in ids
        ]
        deadline = self.tick + rng.randint(1, 300) if rng.random() < deadlines else None
        self._readers.append(
            Reader(self.client.submit(requests), requests, self.context, self.tick, deadline)
        )

    def _beams(self, ids: list[int], prompt: int, most: int) -> Beams | None:
        """A search with so many outputs, now and then, where its beams have room."""
        rng, core = self.rng, self.core
        count, early = rng.randint(len(ids), len(ids) + 3), rng.choice(["heuristic", "full", "never"])
        pages = core.kv.most_of_beams(prompt, prompt + most, count, core.scheduler.max_batch_tokens)
        fits = pages <= core.kv.pool.total and count <= core.scheduler.max_running
        fits = fits and sum(reader.open for reader in self._readers) + count <= IN_FLIGHT
        if rng.random() < 0.7 or not fits:
            return None
        return Beams(count=count, length_penalty=rng.choice([0.0, 1.0]), early_stopping=early, others=ids[1:])

    def _deliver(self) -> None:
        for message in self._frames.feed(self.to_server.arrived()):
            self.client._receive(message)

    def _read(self, faults: Faults) -> None:
        rng, left = self.rng, []
        for reader in self._readers:
            if reader.stalled:
                reader.stalled -= 1
                reader.began += 1
                reader.idle += 1
            else:
                reader.idle = 0
                reader.read()
                if rng.random() < faults.stall:
                    reader.stalled = rng.randint(1, 2 * _READERS_PATIENCE)
            late = reader.deadline is not None and self.tick >= reader.deadline
            if not reader.complete and (late or reader.idle > _READERS_PATIENCE):
                reader.abort(reader.ids)
            elif not reader.complete and rng.random() < faults.abort:
                some = rng.sample(reader.ids, rng.randint(1, len(reader.ids)))
                reader.abort(reader.ids if reader.searches else some)
            age = self.tick - reader.began
            assert age <= self.bound, f"sequence {reader.ids[0]} starves: {age} ticks"
            if not reader.complete:
                left.append(reader)
                continue
            for i in reader.ids:
                self.runner.forget(i)
            if reader.undisturbed:
                self.longest, self.ended = max(self.longest, age), self.ended + 1
        self._readers = left

    def _die(self) -> None:
        """The engine process ends, or its link breaks; its streams end with an error, and another starts."""
        self.deaths += 1
        self.preemptions += self.core.scheduler.preemptions
        self.given_up += self.runner.given_up
        self.raised += self.runner.raised
        self.client.state = "dead"
        self.client._end_streams("the engine died")
        for reader in self._readers:
            reader.read_to_the_end()
        self._readers.clear()
        assert not self.client._streams
        self._start()
