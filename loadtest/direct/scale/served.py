"""Real replicas under a scenario: servers of one thread each on this machine, and the client's own router."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import psutil

from loadtest.direct.scale.routing import Router
from loadtest.direct.scale.traffic import Figures, Scenario, Tally
from loadtest.greedy import GREEDY
from loadtest.load.types import Turn
from loadtest.measuring.loops import loop_factory
from loadtest.measuring.requests import closed_loop
from loadtest.servers import Address
from longspan import AsyncClient


class Used(NamedTuple):
    """Processor seconds of the three processes that a call passes."""

    engine: float
    server: float
    client: float

    @classmethod
    def now(cls, pid: int) -> Used:
        """So far; the server with this id, its engine and this process."""
        process = psutil.Process(pid)
        engines = [child for child in process.children() if "server.engine.ipc.process" in child.cmdline()]
        return cls(sum(map(_seconds, engines)), _seconds(process), _seconds(psutil.Process()))

    def since(self, before: Used) -> Used:
        """What was used between the two."""
        return Used(*(after - then for after, then in zip(self, before, strict=True)))


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(scenario: Scenario, addresses: Sequence[Address], vocabulary: int) -> Figures:
    """Puts a scenario on real replicas that nothing else uses.

    Raises:
        longspan.LongspanError: a call failed.
        ValueError: nothing was answered in the time that counts.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_Users(scenario, addresses).run(vocabulary))


def closed(address: Address, prompts: Sequence[list[int]], output_tokens: int, users: int) -> float:
    """Seconds of a closed loop of so many users until all prompts are answered.

    Raises:
        longspan.LongspanError: a call failed.
        loadtest.measuring.types.CannotMeasureError: an answer had another length.
    """

    async def run() -> float:
        async with AsyncClient(address.host, address.port) as client:
            await closed_loop(client, prompts[:1], output_tokens, 1)  # what a first call makes
            began = time.monotonic()
            await closed_loop(client, prompts[1:], output_tokens, users)
            return time.monotonic() - began

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(run())


class _Users:
    def __init__(self, scenario: Scenario, addresses: Sequence[Address]) -> None:
        self._scenario, self._addresses = scenario, addresses
        self._tally = Tally(scenario)
        self._router = Router(scenario.policy, len(addresses), scenario.seed)

    async def run(self, vocabulary: int) -> Figures:
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(AsyncClient(each.host, each.port, retries=False))
                for each in self._addresses
            ]
            for client in clients:
                await client.generate([1000, 1001], max_tokens=1)  # what a first call makes
            self._start = time.monotonic()
            sessions = self._scenario.sessions(vocabulary)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._scenario.warm_up + self._scenario.seconds):
                    users = (self._user(begin, sessions, clients) for begin in self._scenario.begins())
                    await asyncio.gather(*users)
        return self._tally.figures()

    def _now(self) -> float:
        return time.monotonic() - self._start

    async def _user(
        self, begin: float, sessions: Iterator[list[Turn]], clients: Sequence[AsyncClient]
    ) -> None:
        await asyncio.sleep(begin)
        for turns in sessions:
            said: list[int] = []
            for turn in turns:
                prompt = said + [token for token in turn.prompt if isinstance(token, int)]
                chosen = self._router.begin(prompt)
                said = prompt + await self._call(clients[chosen], prompt, turn.output_tokens)
                self._router.end(chosen)

    async def _call(self, client: AsyncClient, prompt: list[int], output_tokens: int) -> list[int]:
        """A call; its tokens."""
        sent, tokens = self._now(), list[int]()
        stream = client.stream(prompt, max_tokens=output_tokens, ignore_eos=True, **GREEDY)
        async with stream:
            async for delta in stream:
                if count := len(delta.token_ids):
                    now = self._now()
                    self._tally.token(now, count)
                    if not tokens:
                        self._tally.first(now, sent)
                    tokens += delta.token_ids
        self._tally.ended(self._now(), len(prompt), stream.cached_prompt_tokens)
        return tokens
