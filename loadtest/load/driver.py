"""Runs a load: splits sessions over client processes, starts them together, collects their records."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from loadtest.load import worker
from loadtest.load.plan import PATIENCE
from loadtest.load.targets import Target
from loadtest.load.types import ClosedLoop, Load, LoadTestError, Session, Worker
from loadtest.load.worker import Assignment, Progress, Report
from loadtest.measuring.arrivals import arrival_times
from loadtest.measuring.records import Record

# Between the last worker's "ready" and the first request.
_RUN_UP_SECONDS = 0.1
_READY_SECONDS = 60.0
# How long workers may take to cancel their streams and report, once they are told to stop.
_STOP_SECONDS = 15.0


class WorkerDiedError(LoadTestError):
    """A client process ended without a report; the message says which and how."""


class Outcome(NamedTuple):
    """The outcome of a run.

    Attributes:
        records: in the order in which requests were sent.
        workers: the client processes.
        interrupted: it was stopped before its end.
    """

    records: list[Record]
    workers: list[Worker]
    interrupted: bool


Listener = Callable[[Progress], None]


def run(
    target: Target,
    sessions: Sequence[Session],
    load: Load,
    *,
    workers: int,
    seed: int = 0,
    most_seconds: float | None = None,
    patience: float = PATIENCE,
    listener: Listener = lambda progress: None,
) -> Outcome:
    """Sends ``sessions`` to a target and waits for all answers. Ctrl-C stops it and keeps what there is.

    A target that hangs ends it too: then requests have the code ``worker.SILENT``.

    Args:
        target: where to.
        sessions: what to send.
        load: how.
        workers: client processes; no more than users in a closed loop.
        seed: of the arrival times.
        most_seconds: no session begins later than this; ``None`` for no limit.
        patience: seconds without a message, while requests wait, after which the target hangs.
        listener: told the counts of all workers together, a few times a second.

    Raises:
        WorkerDiedError: a client process failed, for example because no server answers.
    """
    whole = Assignment(target, list(sessions), None, 0, most_seconds, patience)
    parts = _split(whole, load, workers, seed)
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    clients: dict[Connection, Any] = {}
    try:
        for part in parts:
            ours, theirs = context.Pipe()
            process = context.Process(target=worker.main, args=(theirs, part), daemon=True)
            process.start()
            theirs.close()
            clients[ours] = process
        for connection, process in clients.items():
            _expect_ready(process, connection)
        start = time.monotonic() + _RUN_UP_SECONDS
        for connection in clients:
            connection.send(start)
        reports, interrupted = _collect(clients, listener)
    finally:
        for process in clients.values():
            process.join(0 if process.exitcode is not None else 2)
            if process.exitcode is None:
                process.kill()
                process.join()
        for connection in clients:
            connection.close()
    records = sorted((record for report in reports for record in report.records), key=lambda r: r.sent)
    return Outcome(records, [report.worker for report in reports], interrupted)


def _split(whole: Assignment, load: Load, workers: int, seed: int) -> list[Assignment]:
    """Parts for the workers; ``whole`` has all sessions, and says nothing of how they are sent."""
    sessions, begins = whole.sessions, None
    users = load.concurrency if isinstance(load, ClosedLoop) else len(sessions)
    count = max(1, min(workers, users, len(sessions)))
    if not isinstance(load, ClosedLoop):
        begins = arrival_times(len(sessions), load.rate, load.burstiness, seed)
        if whole.most_seconds is not None:
            begins = [begin for begin in begins if begin <= whole.most_seconds]
            sessions = sessions[: len(begins)]
    return [
        replace(
            whole,
            sessions=sessions[index::count],
            begins=None if begins is None else begins[index::count],
            concurrency=(users + count - 1 - index) // count,
        )
        for index in range(count)
    ]


def _expect_ready(process: Any, connection: Connection) -> None:
    if not connection.poll(_READY_SECONDS):
        raise WorkerDiedError(f"a client process was not ready within {_READY_SECONDS:.0f} s")
    _receive(connection, process, "before it began; does the server answer?")


def _collect(clients: Mapping[Connection, Any], listener: Listener) -> tuple[list[Report], bool]:
    reports: dict[Connection, Report] = {}
    latest = dict.fromkeys(clients, Progress(0, 0, 0, 0))
    interrupted, deadline = False, float("inf")
    while len(reports) < len(clients):
        try:
            open_ones = [connection for connection in clients if connection not in reports]
            for ready in wait(open_ones, timeout=1.0):
                assert isinstance(ready, Connection)
                message = _receive(ready, clients[ready], "midway")
                if isinstance(message, Report):
                    reports[ready] = message
                else:
                    latest[ready] = message
            listener(Progress(*(sum(column) for column in zip(*latest.values(), strict=True))))
            if time.monotonic() > deadline:
                raise WorkerDiedError("a client process did not stop in time")
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted, deadline = True, time.monotonic() + _STOP_SECONDS
            for connection in clients:
                if connection not in reports:
                    with suppress(OSError):  # it has ended, which the next look at it tells
                        connection.send("stop")
    return [reports[connection] for connection in clients], interrupted


def _receive(connection: Connection, process: Any, when: str) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):  # the latter if it ended while it wrote
        process.join(5)
        raise WorkerDiedError(f"a client process ended with exit code {process.exitcode} {when}") from None
