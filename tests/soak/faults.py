"""Faults, each injected while streams are seen to go on, and each with what must be true afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager

from loadtest.greedy import GREEDY
from longspan import AsyncClient, LongspanError
from tests.e2e import hostile
from tests.e2e.server import Server
from tests.soak.record import Record
from tests.soak.relay import Relay

_CANARIES = 3
# For what takes milliseconds on a quiet machine.
_PATIENCE = 20.0
_READY_SECONDS = 60.0
IDLE_CONNECTIONS = 150
"""Connections to each port on which nothing is sent."""
_VANISHING = 6
_FREED_SECONDS = 1.0
_CROWDED_TOKENS = 30


class Canary:
    """Streams, one after another, until an error or the end.

    Attributes:
        tokens: so far.
        error: that ended it, and when.
    """

    def __init__(self, client: AsyncClient, prompt: str) -> None:
        self._client = client
        self._prompt = prompt
        self.tokens = 0
        self.error: tuple[LongspanError, float] | None = None

    async def run(self, tokens: int) -> None:
        """Streams answers of that many tokens."""
        while True:
            try:
                async with self._client.stream(
                    self._prompt, max_tokens=tokens, ignore_eos=True, **GREEDY
                ) as stream:
                    async for delta in stream:
                        self.tokens += len(delta.token_ids)
            except LongspanError as error:
                self.error = error, time.monotonic()
                return


class Faults:
    """Injects faults into a server.

    Args:
        server: of that.
        record: notes what they find.
        connect: makes a client for the identity of that name, to the server or, with a port, past a relay.
        places: sequences in flight that it takes.
        context: tokens that a sequence may have.
    """

    def __init__(
        self,
        server: Server,
        record: Record,
        connect: Callable[..., AsyncClient],
        *,
        places: int,
        context: int,
    ) -> None:
        self._server = server
        self._record = record
        self._connect = connect
        self._places = places
        self._tokens = context - 64
        self.of_engines: dict[str, Callable[[], Awaitable[None]]] = {
            "engine killed": self._engine_killed,
            "engine hangs": self._engine_hangs,
        }
        self.others: dict[str, Callable[[], Awaitable[None]]] = {
            "clients vanish": self._clients_vanish,
            "idle connections": self._idle_connections,
            "queue full": self._queue_full,
            "path of no UTF-8": self._odd_path,
        }

    async def inject(self, name: str) -> None:
        """Injects a fault by its name, and notes in the window of this moment what it found."""
        try:
            await (self.of_engines | self.others)[name]()
        except (AssertionError, LongspanError, OSError) as error:  # others are to be tried, too
            self._record.now.wrong.append(str(error))

    @asynccontextmanager
    async def _canaries(self) -> AsyncIterator[list[Canary]]:
        """Streams that go on; they must have begun before anything is injected."""
        async with self._connect("canary") as client:
            await client.wait_until_ready(timeout=_PATIENCE)
            canaries = [Canary(client, f"Number {index}") for index in range(_CANARIES)]
            tasks = [asyncio.create_task(canary.run(self._tokens)) for canary in canaries]
            try:
                await _until(lambda: all(canary.tokens for canary in canaries), "streams begin")
                yield canaries
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def _others_go_on(self) -> AsyncIterator[None]:
        async with self._canaries() as canaries:
            yield
            before = [canary.tokens for canary in canaries]
            await _until(
                lambda: all(
                    canary.error or canary.tokens > had for canary, had in zip(canaries, before, strict=True)
                ),
                "streams go on",
            )
            self._record.now.wrong += [
                f"another's stream ended: {canary.error[0]}" for canary in canaries if canary.error
            ]

    async def _engine_killed(self) -> None:
        await self._lose_engine(signal.SIGKILL)

    async def _engine_hangs(self) -> None:
        await self._lose_engine(signal.SIGSTOP)

    async def _lose_engine(self, how: signal.Signals) -> None:
        async with self._canaries() as canaries:
            engine = self._server.engine_pid
            begun = time.monotonic()
            os.kill(engine, how)
            await _until(lambda: all(canary.error for canary in canaries), "streams of a lost engine end")
            errors = [canary.error for canary in canaries if canary.error]
            self._record.now.found["streams ended after"] = max(when for _, when in errors) - begun
            self._record.now.wrong += [
                f"{error.code.name}: {error}" for error, _ in errors if error.code.name != "UNAVAILABLE"
            ]
        async with self._connect("canary") as client:
            await client.wait_until_ready(timeout=_READY_SECONDS)
            self._record.now.found["ready again after"] = time.monotonic() - begun
            await client.generate("Are you there?", max_tokens=3, timeout=_PATIENCE)
        if self._server.engine_pid == engine:
            self._record.now.wrong.append("the engine is the one before")

    async def _clients_vanish(self) -> None:
        async with self._others_go_on(), Relay(self._server) as relay:
            names = [f"vanishing-{index}" for index in range(_VANISHING)]
            async with self._connect("canary", port=relay.port) as client:
                streams = [
                    client.stream("going", max_tokens=self._tokens, ignore_eos=True, request_id=name)
                    for name in names
                ]
                begun = [aiter(stream) for stream in streams]  # a stream that is let go would be cancelled
                for each in begun:
                    await anext(each)
                relay.reset()
            await asyncio.sleep(_FREED_SECONDS)
            async with self._connect("canary") as client:
                left = [name for name in names if await client.abort(name, timeout=_PATIENCE)]
            self._record.now.found["connections reset"] = len(names)
            self._record.now.wrong += [f"{name} ran on after its client had vanished" for name in left]

    async def _idle_connections(self) -> None:
        async with self._others_go_on():
            with ExitStack() as open_ones:
                for port in (self._server.port, self._server.metrics_port) * IDLE_CONNECTIONS:
                    address = self._server.host, port
                    open_ones.enter_context(await asyncio.to_thread(socket.create_connection, address, 5))
                await self._answers()
                await asyncio.to_thread(self._server.metrics)
            self._record.now.found["connections held"] = 2 * IDLE_CONNECTIONS

    async def _queue_full(self) -> None:
        async def ask(client: AsyncClient) -> str:
            try:
                await client.generate("crowd", max_tokens=_CROWDED_TOKENS, ignore_eos=True, timeout=60)
            except LongspanError as error:
                return error.code.name
            return "OK"

        async with self._others_go_on(), self._connect("crowd") as client:
            answers = await asyncio.gather(*(ask(client) for _ in range(self._places + 20)))
        refused = answers.count("RESOURCE_EXHAUSTED")
        self._record.now.found |= {"refused": refused, "answered": answers.count("OK")}
        if not refused or set(answers) != {"OK", "RESOURCE_EXHAUSTED"}:
            self._record.now.wrong.append(f"a crowd was answered {sorted(set(answers))}")

    async def _odd_path(self) -> None:
        async with self._others_go_on():
            await asyncio.to_thread(hostile.send_path, self._server, b"/\xff\xfe")
            await self._answers()

    async def _answers(self) -> None:
        """A client that comes now is answered."""
        async with self._connect("canary") as client:
            await client.wait_until_ready(timeout=_PATIENCE)
            await client.generate("hello", max_tokens=2, timeout=_PATIENCE)


async def _until(condition: Callable[[], bool], what: str, seconds: float = _PATIENCE) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 (streams and counts send no event)
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{seconds:g} s have passed without that {what}") from None
