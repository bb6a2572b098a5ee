"""Simulates a scenario: users, a router, replicas."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import simpy

from loadtest.direct.scale.costs import Costs, LoopCost
from loadtest.direct.scale.processors import Loop, Processors
from loadtest.direct.scale.replica import Output, Replica
from loadtest.direct.scale.routing import Router
from loadtest.direct.scale.traffic import Figures, Scenario, Tally
from loadtest.load.types import Turn


def simulate(scenario: Scenario, costs: Costs, *, one_machine: bool = False) -> Figures:
    """What the replicas would do.

    Args:
        scenario: of users and replicas.
        costs: of one replica.
        one_machine: all replicas and the client share one machine, as where they are measured. Else each
            replica has a machine like it, and clients take no time of theirs.

    Raises:
        ValueError: nothing was answered in the time that counts.
    """
    world = _World(scenario, costs, one_machine)
    world.env.run(until=scenario.warm_up + scenario.seconds)
    return world.figures()


class _World:
    def __init__(self, scenario: Scenario, costs: Costs, one_machine: bool) -> None:
        self.env = simpy.Environment()
        self.tally = Tally(scenario)
        self._cost = costs.client if one_machine else LoopCost()
        self._calls = itertools.count(1)
        self._first: dict[int, float] = {}
        self._waiting: dict[int, simpy.Event] = {}
        self._router = Router(scenario.policy, scenario.replicas, scenario.routing_seed)
        clients = Processors(self.env, costs.cores)
        self._client = Loop(clients)
        self._machines = (
            [clients]
            if one_machine
            else [Processors(self.env, costs.cores) for _ in range(scenario.replicas)]
        )
        self._replicas = [
            Replica(self.env, self._machines[number % len(self._machines)], costs, self._receive)
            for number in range(scenario.replicas)
        ]
        sessions = scenario.sessions(costs.limits.vocabulary)
        for begin in scenario.begins():
            self.env.process(self._user(begin, sessions))

    def figures(self) -> Figures:
        """The results so far."""
        steps = sum(replica.steps + replica.given_up for replica in self._replicas)
        seconds = sum(machine.on_steps for machine in self._machines)
        return self.tally.figures(seconds / max(1, steps))

    def _user(self, begin: float, sessions: Iterator[list[Turn]]) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(begin)
        for turns in sessions:
            said: list[int] = []
            for turn in turns:
                prompt = said + [token for token in turn.prompt if isinstance(token, int)]
                said = yield from self._call(prompt, turn.output_tokens)

    def _call(self, prompt: list[int], output_tokens: int) -> Generator[simpy.Event, Any, list[int]]:
        """A call; all that is said by its end."""
        call, sent = next(self._calls), self.env.now
        chosen = self._router.begin(prompt)
        self._first[call], self._waiting[call] = sent, self.env.event()
        ask = partial(self._replicas[chosen].ask, call, prompt, output_tokens)
        self._client.do(self._cost.request, ask)
        sequence = yield self._waiting[call]
        self._router.end(chosen)
        self.tally.ended(self.env.now, len(prompt), sequence.cached_tokens)
        return list(sequence.tokens)

    def _receive(self, outputs: list[Output]) -> None:
        """A server process has sent the outputs of a step."""
        if outputs:
            seconds = self._cost.message + self._cost.token * len(outputs)
            self._client.do(seconds, partial(self._take, outputs))

    def _take(self, outputs: list[Output]) -> None:
        now = self.env.now
        self.tally.token(now, len(outputs))
        for output in outputs:
            if (sent := self._first.pop(output.call, None)) is not None:
                self.tally.first(now, sent)
            if output.finished:
                self._waiting.pop(output.call).succeed(output.sequence)
