"""Three times as many users as a server takes, and how soon those that are too many are refused."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

from longspan import AsyncClient, BusyError
from tests.e2e.server import Server
from tests.processes import Starving
from tests.soak.bounds import p99

REFUSED_SECONDS = 0.05
"""That a refusal may take where no other program has the cores, on a fast processor."""

_TIMES = 3
_ASK = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
_AGAIN_SECONDS = 0.05
_LOOK_SECONDS = 0.02


@dataclass
class Overload:
    """What came of it.

    Attributes:
        answers: seconds that each request took which was answered; all answers are alike.
        refused: seconds that each refusal took.
        own: the same, less what server and client waited for cores that other programs had.
    """

    answers: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        shown = ", ".join(
            f"{name} p50 {1000 * sorted(values)[len(values) // 2]:.1f} ms, p99 {1000 * p99(values):.1f} ms"
            for name, values in (("answers", self.answers), ("refusals", self.refused), ("own", self.own))
            if values
        )
        return f"{len(self.answers)} answers, {len(self.refused)} refusals: {shown}"


async def overloaded(server: Server, *, places: int, seconds: float) -> Overload:
    """Puts it on a server for some seconds; the users are this process's.

    Args:
        server: to be overloaded.
        places: requests that run and wait there at once, at most.
        seconds: how long.
    """
    found = Overload()
    # Not the engine, which no refusal waits for.
    starving = Starving(server.process.pid, os.getpid())
    async with AsyncClient(server.host, server.port, retries=False) as client:
        expected = (await client.generate("hello", **_ASK)).token_ids
        end = time.monotonic() + seconds

        async def user() -> None:
            while (begun := time.monotonic()) < end:
                try:
                    assert (await client.generate("hello", **_ASK)).token_ids == expected
                    found.answers.append(time.monotonic() - begun)
                except BusyError:
                    ended = time.monotonic()
                    found.refused.append(ended - begun)
                    late = ended - begun > REFUSED_SECONDS
                    found.own.append(starving.less(begun, ended) if late else ended - begun)
                    await asyncio.sleep(_AGAIN_SECONDS)

        async def look() -> None:
            while time.monotonic() < end:
                starving.look()
                load = (await client.server_info()).load
                assert load.running + load.waiting <= places
                await asyncio.sleep(_LOOK_SECONDS)

        await asyncio.gather(look(), *(user() for _ in range(_TIMES * places)))
    return found
