"""A client process: sends sessions, times their streams, reports."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

from loadtest.load.measures import percentile
from loadtest.load.senders import Sender, sender
from loadtest.load.targets import Target
from loadtest.load.types import Message, Session, Turn, Worker
from loadtest.measuring.loops import loop_factory
from loadtest.measuring.records import Record
from loadtest.measuring.requests import sleep_until

SILENT = "NO_MESSAGE"
"""Code of requests that were given up, since the target sent nothing for too long."""

_TELL_SECONDS = 0.25
_LAG_PROBE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Assignment:
    """One worker's part of a run.

    Attributes:
        target: where to.
        sessions: to send.
        begins: seconds after the start at which each begins; ``None`` in a closed loop.
        concurrency: users, in a closed loop.
        most_seconds: no session begins later than this after the start; ``None`` for no limit.
        patience: seconds without a message, while requests wait, after which all of them are given up.
    """

    target: Target
    sessions: list[Session]
    begins: list[float] | None
    concurrency: int
    most_seconds: float | None
    patience: float


class Progress(NamedTuple):
    """Counts so far of one worker."""

    sent: int
    ended: int
    failed: int
    tokens: int


class Report(NamedTuple):
    """A worker's final report."""

    records: list[Record]
    worker: Worker


def why_silent(patience: float) -> str:
    """Why requests were given up, a sentence without a full stop."""
    return (
        f"the server sent nothing for {patience:g} seconds while requests waited; if it does not hang, but "
        "computes, `longspan load` waits longer with --patience"
    )


def main(connection: Connection, assignment: Assignment) -> None:
    """The process. It says ``"ready"``, takes the monotonic time to start at, and ends with a ``Report``.

    A later message of any kind makes it stop where it is and report what it has.
    """
    for each in ("SIGINT", "SIGTERM", "SIGHUP"):  # the parent process decides; without it, the worker ends
        if hasattr(signal, each):
            signal.signal(getattr(signal, each), signal.SIG_IGN)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_Client(connection, assignment).run())


class _Client:
    def __init__(self, connection: Connection, assignment: Assignment) -> None:
        self._connection = connection
        self._assignment = assignment
        self._records: list[Record] = []
        self._lags: list[float] = []
        self._silent = False

    async def run(self) -> None:
        async with sender(self._assignment.target) as client:  # connected before the clock runs
            self._connection.send("ready")
            start: float = await asyncio.to_thread(self._connection.recv)
            await sleep_until(start)
            busy = time.process_time()
            sending = asyncio.create_task(self._send_all(client, start))
            stop, silence = asyncio.create_task(self._told_to_stop()), asyncio.create_task(self._silence())
            tasks = (
                *(sending, stop, silence),
                *(asyncio.create_task(self._tell()), asyncio.create_task(self._probe_lag())),
            )
            await asyncio.wait({sending, stop, silence}, return_when=asyncio.FIRST_COMPLETED)
            self._silent = silence.done()
            for task in tasks:
                task.cancel()
            wall = time.monotonic() - start
            await asyncio.gather(*tasks, return_exceptions=True)
            if sending.done() and not sending.cancelled() and (error := sending.exception()):
                raise error
            share = (time.process_time() - busy) / max(wall, 1e-9)
            client.finish()
        self._connection.send(Report(self._records, Worker(share, percentile(sorted(self._lags), 0.99))))

    async def _send_all(self, client: Sender, start: float) -> None:
        assignment = self._assignment
        if assignment.begins is None:
            left = iter(assignment.sessions)
            users = (self._user(client, left, start) for _ in range(assignment.concurrency))
            await asyncio.gather(*users)
        else:
            begins = zip(assignment.sessions, assignment.begins, strict=True)
            await asyncio.gather(*(self._at(client, session, start + begin) for session, begin in begins))

    async def _user(self, client: Sender, left: Iterator[Session], start: float) -> None:
        limit = self._assignment.most_seconds
        for session in left:
            if limit is not None and time.monotonic() - start > limit:
                return
            await self._session(client, session, None)

    async def _at(self, client: Sender, session: Session, when: float) -> None:
        await sleep_until(when)
        await self._session(client, session, when)

    async def _session(self, client: Sender, session: Session, begin: float | None) -> None:
        history: list[Message] = []
        for number, turn in enumerate(session.turns):
            now = time.monotonic()
            intended = begin if begin is not None and number == 0 else now
            record = Record(session.index, number, intended, now, expected_tokens=turn.output_tokens)
            self._records.append(record)
            prompt = turn.prompt
            if isinstance(prompt, list) and prompt and isinstance(prompt[0], tuple):
                history += [message for message in prompt if isinstance(message, tuple)]
                prompt = list(history)
            try:
                answer = await client.send(Turn(prompt, turn.output_tokens), record)
            except asyncio.CancelledError:
                record.code, record.error = "CANCELLED", "the load test was stopped"
                if self._silent:
                    record.code, record.error = SILENT, why_silent(self._assignment.patience)
                raise
            if record.error:
                return
            history.append(("assistant", answer))

    async def _tell(self) -> None:
        running: list[Record] = []
        seen = ended = failed = tokens = 0
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            running += self._records[seen:]
            seen = len(self._records)
            for record in running:
                if not math.isnan(record.ended):
                    ended, failed, tokens = ended + 1, failed + bool(record.error), tokens + record.tokens
            running = [record for record in running if math.isnan(record.ended)]
            under_way = sum(record.tokens for record in running)
            self._connection.send(Progress(seen, ended, failed, tokens + under_way))

    async def _probe_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LAG_PROBE_SECONDS)
            self._lags.append(max(0.0, time.monotonic() - before - _LAG_PROBE_SECONDS))

    async def _silence(self) -> None:
        """Ends when requests wait for the target, and it has sent nothing for longer than the patience."""
        heard, seen = -math.inf, 0
        waiting: list[Record] = []
        while True:
            await asyncio.sleep(min(_TELL_SECONDS, self._assignment.patience / 4))
            waiting += self._records[seen:]
            seen = len(self._records)
            for record in waiting:
                if record.arrivals:
                    heard = max(heard, record.arrivals[-1][0])
                if not math.isnan(record.ended):
                    heard = max(heard, record.ended)
            waiting = [record for record in waiting if math.isnan(record.ended)]
            first = min((record.sent for record in waiting), default=math.inf)
            if time.monotonic() - max(heard, first) > self._assignment.patience:
                return

    async def _told_to_stop(self) -> None:
        while not self._connection.poll():  # noqa: ASYNC110 (a pipe tells no event loop)
            await asyncio.sleep(_TELL_SECONDS)
