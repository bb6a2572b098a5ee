"""A run: a real server under load, faults and hostile inputs, for some time."""

from __future__ import annotations

import asyncio
import functools
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from longspan import AsyncClient
from tests.e2e.server import Server
from tests.processes import wait_ended
from tests.soak.bounds import Bound, End, Limits, growth, judge
from tests.soak.encoders import ENCODER_KILLED, ENCODERS, EncoderLoad, start_encoder
from tests.soak.faults import Faults
from tests.soak.filling import Filler
from tests.soak.inputs import COUNTED
from tests.soak.record import Record
from tests.soak.schedule import QUIET, schedule
from tests.soak.senders import Senders
from tests.soak.traffic import Counted, Users, questions
from tests.soak.watching import Watcher

_USERS = 6
_MAX_RUNNING, _MAX_QUEUE = 16, 32
# Encoders get so many times fewer hostile inputs.
_FEWER = 7
# Valid inputs among the hostile ones may ask for much: they must leave the rest to real clients.
_IDENTITIES = {
    "user": "",
    "canary": "",
    "crowd": "",
    "hostile": "requests_in_flight = 2\ntokens_per_minute = 3000\n",
}
# For an engine whose cache takes long to fill to be seen for long enough.
_LONGER_SECONDS = 1800.0
# For the last calls of clients that have gone.
_SETTLE_SECONDS = 20.0
# A process whose parent has ended is killed by the kernel.
_END_SECONDS = 2.0
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?: .*\n)+(.*)", re.MULTILINE)
# grpcio itself logs the path that is not UTF-8.
_OF_THE_PATH = "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 1"


@dataclass(frozen=True)
class Plan:
    """What a run is made of.

    Attributes:
        seed: of schedule, questions, users and inputs.
        seconds: of load, and more until growth of an engine can be judged.
        window: seconds of one fault, at least.
        per_second: hostile inputs.
        step_timeout: the server's ``--engine-step-timeout``.
        server: further options of ``longspan serve``.
        limits: what must hold.
        encoders: whether servers of encoders have load and faults beside it.
    """

    seed: int
    seconds: float
    window: float
    per_second: float
    step_timeout: float
    server: Sequence[str | Path]
    limits: Limits
    encoders: bool = False


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        record: all that was seen.
        end: the server after the load.
        bounds: what had to hold, and whether it did.
    """

    record: Record
    end: End
    bounds: list[Bound]


def run(plan: Plan, folder: Path) -> Result:
    """Does it; identities and the servers' logs are left in ``folder``."""
    identities = folder / "identities.toml"
    tokens = {name: _token(name, identities) for name in _IDENTITIES}
    options: list[str | Path] = [
        *("--identities", identities, "--on-engine-failure", "restart"),
        # Restarts are what is tried here: none is one too many, and none waits for those before it.
        *("--restart-limit", "1000", "--restart-window-seconds", "1"),
        *("--engine-step-timeout", f"{plan.step_timeout}", "--max-queue", f"{_MAX_QUEUE}"),
    ]
    record = Record()
    servers: dict[str, Server] = {}
    watchers: list[Watcher] = []
    log, exit_code = "", 0
    try:
        servers["server"] = Server(*options, "--max-running", f"{_MAX_RUNNING}", *plan.server)
        for name in ENCODERS if plan.encoders else ():
            servers[name] = start_encoder(name, folder / name, *options)
        for name, server in servers.items():
            watchers.append(_watcher(name, server, record))
            watchers[-1].start()
        load = _Load(plan, servers, tokens, record)
        asyncio.run(load.run())
    finally:
        for watcher in watchers:
            watcher.end()
        for name, server in servers.items():
            told = server.log  # which goes when the server is stopped
            (folder / f"{name}.log").write_text(told)
            log += told
            exit_code = max(exit_code, abs(server.stop()))
    end = End(
        **load.counts,
        exit_code=exit_code,
        processes=sum(not _ended(process) for watcher in watchers for process in watcher.processes),
        tracebacks=sum(_OF_THE_PATH not in error for error in _TRACEBACK.findall(log)),
    )
    return Result(record, end, judge(record, plan.limits, end))


def _watcher(name: str, server: Server, record: Record) -> Watcher:
    if name not in ENCODERS:
        return Watcher(server, record, record.server, record.engine)
    memory = record.encoders
    of_server, of_engine = memory.setdefault(f"{name}: server", []), memory.setdefault(f"{name}: engine", [])
    return Watcher(server, record, of_server, of_engine)


def _ended(process: psutil.Process) -> bool:
    try:
        wait_ended(process, _END_SECONDS)
    except AssertionError:
        return False
    return True


def _token(name: str, file: Path) -> str:
    command = [sys.executable, "-m", "loadtest.cli", "token", name, "--identities", str(file)]
    token = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with file.open("a") as writing:
        writing.write(_IDENTITIES[name])
    return token


class _Load:
    """The load on the servers.

    Attributes:
        counts: the attributes of ``End`` that running servers tell.
    """

    def __init__(
        self, plan: Plan, servers: Mapping[str, Server], tokens: dict[str, str], record: Record
    ) -> None:
        self._plan = plan
        self._servers = servers
        self._tokens = tokens
        self._record = record
        self._encoders = [
            EncoderLoad(name, server, record, functools.partial(self._connect, server=server))
            for name, server in servers.items()
            if name in ENCODERS
        ]
        self.counts: dict[str, int | tuple[int, int]] = {}

    def _connect(self, name: str, port: int | None = None, server: Server | None = None) -> AsyncClient:
        server = server or self._servers["server"]
        return Counted(server.host, port or server.port, self._tokens[name], self._record)

    async def run(self) -> None:
        """Begins with idle servers, and leaves idle ones."""
        rng = random.Random(self._plan.seed)
        drawn = [random.Random(rng.random()) for _ in range(_USERS)]
        async with self._connect("user") as client:
            asked = await questions(client, rng)
            for encoder in self._encoders:
                await encoder.prepare(random.Random(rng.random()))
            context = (await client.model_info()).context_length
            descriptors = self._descriptors()
            users = Users(client, asked, self._record)
            senders = [
                Senders(server, self._tokens["hostile"], self._record, random.Random(rng.random()))
                for server in self._servers.values()
            ]
            filler = Filler(client, self._record, random.Random(rng.random()))
            async with asyncio.TaskGroup() as group:
                group.create_task(filler.run())
                for each in drawn:
                    group.create_task(users.one(each))
                for encoder in self._encoders:
                    group.create_task(encoder.users(random.Random(rng.random())))
                for number, sender in enumerate(senders):
                    rate = self._plan.per_second / (_FEWER if number else 1)
                    group.create_task(sender.send(rate))
                try:
                    await self._windows(rng, context)
                finally:
                    for one in (users, filler, *senders, *self._encoders):
                        one.ended = True
            await self._settle()
            for question in asked:
                await users.ask(question)
        for encoder in self._encoders:
            await encoder.ask_again()
        self._count(descriptors)

    async def _windows(self, rng: random.Random, context: int) -> None:
        faults = Faults(
            self._servers["server"],
            self._record,
            self._connect,
            places=_MAX_RUNNING + _MAX_QUEUE,
            context=context,
        )
        if self._encoders:
            faults.of_engines[ENCODER_KILLED] = lambda: rng.choice(self._encoders).lose_engine()
        windows = int(self._plan.seconds / self._plan.window)
        for number, fault in enumerate(schedule(rng, windows, faults.of_engines, faults.others)):
            print(f"window {number + 1} of {windows}: {fault}", file=sys.stderr, flush=True)
            await self._window(fault, faults)
        last = time.monotonic() + _LONGER_SECONDS
        while self._plan.limits.growth is not None and time.monotonic() < last:
            if growth(self._record.engine, self._record.full) is not None:
                break
            # On a slow machine the KV cache takes minutes to fill, and memory is to be seen after that.
            print("one window more: the engine's memory was not seen for long enough", file=sys.stderr)
            await self._window(QUIET, faults)

    async def _window(self, fault: str, faults: Faults) -> None:
        end = time.monotonic() + self._plan.window
        self._record.begin(fault)
        if fault != QUIET:
            await faults.inject(fault)
        # A window is longer where its fault is, or where clients and looks at health are not yet seen served.
        last = time.monotonic() + 2 * self._plan.window
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        while time.monotonic() < last and not self._served():  # noqa: ASYNC110 (counts send no event)
            await asyncio.sleep(0.05)

    def _served(self) -> bool:
        least, now = self._plan.limits.answers, self._record.now
        return now.answered >= least and now.compared >= least and bool(now.health)

    async def _settle(self) -> None:
        """Waits until the servers have nothing to do; notes what they still work on if that does not come."""
        end = time.monotonic() + _SETTLE_SECONDS
        while True:
            left = 0
            for server in self._servers.values():
                async with self._connect("user", server=server) as client:
                    load = (await client.server_info()).load
                left += load.pages_used + load.running + load.waiting
            if not left or time.monotonic() > end:
                self.counts["pages"] = left
                return
            await asyncio.sleep(0.1)

    def _descriptors(self) -> int:
        return sum(psutil.Process(server.process.pid).num_fds() for server in self._servers.values())

    def _count(self, descriptors: int) -> None:
        scrapes = [server.metrics() for server in self._servers.values()]

        def total(metric: str, *methods: str) -> int:
            wanted = [f'grpc_method="{method}"' for method in methods] or [""]
            return int(
                sum(
                    value
                    for samples in scrapes
                    for name, value in samples.items()
                    if name.startswith(f"{metric}{{") and any(each in name for each in wanted)
                )
            )

        self.counts |= {
            "started": total("longspan_grpc_server_started_total", *COUNTED),
            "handled": total("longspan_grpc_server_handled_total", *COUNTED),
            "counted": total("longspan_requests_total"),
            "restarts": total("longspan_engine_restarts_total"),
            "descriptors": (descriptors, self._descriptors()),
        }
