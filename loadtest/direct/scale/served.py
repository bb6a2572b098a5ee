"""Real replicas under a scenario: servers of one thread each on this machine, and the client's own router."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence

from loadtest.direct.scale.calibrate import used
from loadtest.direct.scale.routing import Router
from loadtest.direct.scale.traffic import Figures, Scenario, Tally
from loadtest.greedy import GREEDY
from loadtest.load.types import Turn
from loadtest.servers import Address
from longspan import AsyncClient


async def measure(scenario: Scenario, addresses: Sequence[Address], vocabulary: int) -> Figures:
    """Puts a scenario on real replicas that nothing else uses.

    Raises:
        longspan.LongspanError: a call failed.
        ValueError: nothing was answered in the time that counts.
    """
    return await _Users(scenario, addresses).run(vocabulary)


class _Users:
    def __init__(self, scenario: Scenario, addresses: Sequence[Address]) -> None:
        self._scenario, self._addresses = scenario, addresses
        self._tally = Tally(scenario)
        self._router = Router(scenario.policy, len(addresses), scenario.routing_seed)

    async def run(self, vocabulary: int) -> Figures:
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(AsyncClient(each.host, each.port, retries=False))
                for each in self._addresses
            ]
            for client in clients:
                await client.generate([1000, 1001], max_tokens=1)  # what a first call makes
            before = [used(each) for each in self._addresses]
            self._start = time.monotonic()
            sessions = self._scenario.sessions(vocabulary)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._scenario.warm_up + self._scenario.seconds):
                    users = (self._user(begin, sessions, clients) for begin in self._scenario.begins())
                    await asyncio.gather(*users)
        spent = [used(each).since(then) for each, then in zip(self._addresses, before, strict=True)]
        steps = sum(each.steps for each in spent)
        return self._tally.figures(sum(each.engine for each in spent) / max(1, steps))

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
