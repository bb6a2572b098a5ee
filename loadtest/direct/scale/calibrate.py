"""Measures what a replica's steps and messages cost on this machine: processor time of its processes.

A server gets loads whose work is known to the token; then two get them at the same time, and then as many as
crowd the cores. Least squares divide the processor time of each process among the parts of the work.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import NamedTuple

import psutil

from loadtest import document
from loadtest.direct.scale.costs import Costs, Limits, LoopCost, StepCost, Work
from loadtest.measuring.requests import closed_loop
from loadtest.measuring.served import Run
from loadtest.servers import Address, serve
from longspan import AsyncClient


class Load(NamedTuple):
    """Users that send requests one after the other, each of so many tokens.

    Attributes:
        known: all requests have one prompt, whose pages are in the prefix cache before: they only decode.
    """

    users: int
    requests: int
    prompt: int
    output: int
    known: bool = False

    def work(self, steps: int, cached: Sequence[int]) -> Work:
        """Of so many steps; a request's first token comes of its prompt's last step.

        Args:
            steps: that were computed.
            cached: of each request, tokens of its prompt that were found in the prefix cache.
        """
        each = [Work.of([(found, self.prompt - found)]) for found in cached]
        decodes = len(cached) * (self.output - 1)
        context = decodes * (2 * self.prompt + self.output - 2) // 2
        return Work(
            steps,
            decodes + sum(one.decodes for one in each),
            context + sum(one.context for one in each),
            sum(one.tokens for one in each),
            sum(one.pairs for one in each),
        )


# The first seconds of steps of a new engine take up to twice as long as later ones.
_WARM_UP = Load(4, 24, 32, 96)
_LOADS = (
    Load(1, 4, 16, 96),
    Load(4, 12, 16, 64),
    Load(16, 32, 16, 64),
    Load(8, 48, 64, 1),
    Load(1, 2, 2048, 1),
    Load(4, 4, 1024, 64),
    Load(8, 16, 256, 32),
    # Else errors in the time of long prompts are taken for time of the tokens that decodes see.
    Load(4, 8, 2049, 64, known=True),
)


class Used(NamedTuple):
    """Steps that were computed, and processor seconds."""

    steps: int
    engine: float
    server: float

    def since(self, before: Used) -> Used:
        """What was used between the two."""
        return Used(self.steps - before.steps, self.engine - before.engine, self.server - before.server)


class _Ran(NamedTuple):
    """A load on one server.

    Attributes:
        used: by the server.
        cached: of each request, tokens of its prompt that were found in the prefix cache.
        client: its share of this process's processor seconds.
    """

    used: Used
    cached: list[int]
    client: float


REPLICAS = 4
"""The most that the validation has."""


def calibrate(arguments: Sequence[str], run: Run) -> Costs:
    """All costs, of servers that end after it; see ``costs_of``.

    Args:
        arguments: of ``longspan serve``.
        run: of the one event loop, see ``loadtest.measuring.served``.

    Raises:
        loadtest.servers.NotStartedError: a server did not start.
        longspan.LongspanError: a request failed.
        ValueError: a server's engine process or its steps were not found.
    """
    with ExitStack() as stack:
        return run(costs_of([stack.enter_context(serve(*arguments)) for _ in range(at_once()[-1])], "costs"))


def at_once() -> list[int]:
    """How many replicas get the loads at the same time."""
    cores = len(os.sched_getaffinity(0))
    # On more cores none has steps of several replicas to compute.
    return sorted({1, 2, 2 * cores}) if cores < REPLICAS else [1, 2]


async def warm_up(servers: Sequence[Address], vocabulary: int) -> None:
    """Has new servers compute until they are as fast as they will be.

    Raises:
        longspan.LongspanError: a request failed.
    """
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(each.host, each.port)) for each in servers]
        await _run(servers, clients, _WARM_UP, vocabulary, random.Random("warm-up"))


async def costs_of(servers: Sequence[Address], seed: str) -> Costs:
    """All costs, in two or three minutes.

    Args:
        servers: that do nothing else, as many as ``at_once`` names last or more; all are warm afterwards.
        seed: of the prompts; one that these servers have not had, whose prefix caches know its prompts.

    Raises:
        longspan.LongspanError: a request failed.
        ValueError: a server's engine process or its steps were not found.
    """
    rng, counts_together = random.Random(seed), at_once()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(each.host, each.port)) for each in servers]
        limits = await _limits(clients[0])
        await _run(servers, clients, _WARM_UP, limits.vocabulary, rng)
        steps, counts, server, client = {}, [], [], []
        for together in counts_together:
            measured = []
            for load in _LOADS:
                for ran in await _run(servers[:together], clients[:together], load, limits.vocabulary, rng):
                    measured.append((load.work(ran.used.steps, ran.cached), ran.used.engine))
                    counts.append((load.requests, ran.used.steps, load.requests * load.output))
                    server.append(ran.used.server)
                    client.append(ran.client)
            steps[together] = StepCost.fit(measured)
    return Costs(
        alone=steps[1],
        beside=steps[2],
        crowded=steps[counts_together[-1]],
        server=LoopCost.fit(counts, server),
        client=LoopCost.fit(counts, client),
        cores=len(os.sched_getaffinity(0)),
        limits=limits,
        machine=document.cores_of(document.machine()),
    )


async def _run(
    servers: Sequence[Address],
    clients: Sequence[AsyncClient],
    load: Load,
    vocabulary: int,
    rng: random.Random,
) -> list[_Ran]:
    """Puts a load on each server, on all at the same time, with prompts that no load before had."""
    ids = range(min(1000, vocabulary // 2), vocabulary)
    prompts = []
    for client in clients:
        if load.known:
            prompts.append([rng.choices(ids, k=load.prompt)] * load.requests)
            await client.generate(prompts[-1][0], max_tokens=1)
        else:
            prompts.append([rng.choices(ids, k=load.prompt) for _ in range(load.requests)])
    before, began = [used(each) for each in servers], time.process_time()
    runs = (
        closed_loop(client, own, load.output, load.users)
        for client, own in zip(clients, prompts, strict=True)
    )
    records = await asyncio.gather(*runs)
    seconds = (time.process_time() - began) / len(servers)
    spent = [used(each).since(earlier) for each, earlier in zip(servers, before, strict=True)]
    if not all(one.steps for one in spent):
        raise ValueError("the server's metrics tell of no step, so that nothing can be measured")
    return [
        _Ran(one, [record.cached_tokens for record in own], seconds)
        for one, own in zip(spent, records, strict=True)
    ]


def used(address: Address) -> Used:
    """What a server has used so far. The steps come first, since to ask for them takes the server time.

    Raises:
        ValueError: the server has no engine process.
    """
    with urllib.request.urlopen(address.metrics_url, timeout=30) as response:
        text = response.read().decode()
    steps = re.findall(r"^longspan_engine_step_duration_seconds_count\{.*\} (\S+)$", text, re.MULTILINE)
    process = psutil.Process(address.pid)
    engines = [each for each in process.children() if "server.engine.ipc.process" in each.cmdline()]
    if not engines:
        raise ValueError(f"process {address.pid} has no engine process, so that nothing can be measured")
    return Used(int(sum(map(float, steps))), sum(map(_seconds, engines)), _seconds(process))


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _limits(client: AsyncClient) -> Limits:
    """The sizes that a server has, by what it says of itself."""
    model, server = await client.model_info(), await client.server_info()
    settings = server.settings
    return Limits(
        pages=server.load.pages_total + 1,
        page_size=server.load.page_size,
        max_running=int(settings["max_running"]),
        max_batch_tokens=int(settings["max_batch_tokens"]),
        max_prefills=int(settings["max_prefills"]),
        prompt_step_seconds=float(settings["prompt_step_ms"]) / 1000,
        aging=float(settings["priority_aging_seconds"]),
        gives_up=model.executor.name == "native",
        context_length=model.context_length,
        vocabulary=model.vocabulary_size,
    )
