"""One load or a sweep of them: measured, checked against the server's metrics, and kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.load import driver, reconcile, result, validity
from loadtest.load.device import device_use, to_measure, watched
from loadtest.load.measures import summarize
from loadtest.load.result import Result, Run
from loadtest.load.sweep import Sweep
from loadtest.load.types import ClosedLoop, Load, Session, Summary, Targets
from loadtest.load.worker import Progress as Counts
from longspan import Client

# The server books a request just after its last message, and measures its device in its first second of rest.
_SETTLE_SECONDS = 3.0
# How long an open loop lasts, unless the number of its sessions is given.
_OPEN_SECONDS = 30.0
# Workloads use a few seeds from the one that they are given.
_SEEDS_PER_RUN = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        host: of the server.
        port: its gRPC port.
        metrics_url: where its metrics are; ``None`` to leave them out.
        workload: name and what it was drawn with, for the result.
        draw: makes so many sessions from a seed. Each run gets its own, so that the server's prefix cache
            knows nothing of it from the one before.
        loads: how to send them, one run each; a ``Sweep`` decides as it goes.
        sessions: of each run; ``None`` for a number that suits the load.
        warmup: sessions sent before each run; ``None`` for a number that suits the load.
        workers: client processes.
        seed: of workload and arrivals.
        most_seconds: no session begins later than this in a run.
        targets: of a good request.
    """

    host: str
    port: int
    metrics_url: str | None
    workload: dict[str, Any]
    draw: Callable[[int, int], list[Session]]
    loads: list[Load] | Sweep
    sessions: int | None
    warmup: int | None
    workers: int
    seed: int
    most_seconds: float | None
    targets: Targets | None


def measure(plan: Plan, console: Console) -> Result:
    """Runs the plan, with live progress on ``console``. Ctrl-C ends the run under way and the plan.

    Raises:
        longspan.LongspanError: the server does not answer.
        reconcile.ScrapeError: its metrics can't be read.
        driver.WorkerDiedError: a client process failed.
    """
    found = describe(plan)
    for number, load in enumerate(plan.loads):
        run = _run(plan, load, number, found.server["device"], console)
        if run is None:
            break
        found.runs.append(run)
        if isinstance(plan.loads, Sweep):
            plan.loads.learn(run.summary)
        if run.interrupted:
            break
    return found


def describe(plan: Plan) -> Result:
    """A result without runs: the machine and the server."""
    with Client(plan.host, plan.port, timeout=30) as client:
        model, info = client.model_info(), client.server_info()
    attention = model.attention
    return Result(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=plan.seed,
        machine=result.machine(),
        versions={"longspan": info.version, "client": version("longspan"), **info.versions},
        server={
            "model": model.name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "dtype": model.dtype,
            "kv_dtype": model.kv_dtype,
            "device": info.device,
            "context_length": model.context_length,
            "attention": {
                "backend": attention.backend,
                "pattern": attention.pattern,
                "kernel": attention.kernel,
                "options": dict(attention.options),
            },
            "settings": dict(info.settings),
        },
        runs=[],
    )


def _counts(plan: Plan, load: Load) -> tuple[int, int, int]:
    """Sessions of a run, and of its warm-up, and users of the warm-up."""
    users = load.concurrency if isinstance(load, ClosedLoop) else 4
    usual = max(16, 4 * users if isinstance(load, ClosedLoop) else round(_OPEN_SECONDS * load.rate))
    warmup = users if plan.warmup is None else plan.warmup
    # Fewer sessions than users would measure fewer users.
    least = users if isinstance(load, ClosedLoop) else 1
    return max(plan.sessions or usual, least), warmup, max(1, min(users, warmup))


def _run(plan: Plan, load: Load, number: int, device: str, console: Console) -> Run | None:
    """One run after its warm-up; ``None`` if it was stopped before any request."""
    count, warmup, users = _counts(plan, load)
    seed = plan.seed + _SEEDS_PER_RUN * number
    sessions = plan.draw(count, seed)
    if warmup:
        warm = plan.draw(warmup, seed + 5)
        with _watch(console, f"warm-up for {_words(load)}", len(warm)) as listener:
            outcome = driver.run(
                plan.host, plan.port, warm, ClosedLoop(users), workers=plan.workers, listener=listener
            )
        if outcome.interrupted:
            return None
    before = reconcile.scrape(plan.metrics_url) if plan.metrics_url else None
    requests = sum(len(session.turns) for session in sessions)
    with _watch(console, _words(load), requests) as listener, watched(plan.metrics_url) as during:
        outcome = driver.run(
            plan.host,
            plan.port,
            sessions,
            load,
            workers=plan.workers,
            seed=seed,
            most_seconds=plan.most_seconds,
            listener=listener,
        )
    if not outcome.records:
        return None
    summary = summarize(outcome.records, plan.targets)
    server = use = None
    if plan.metrics_url and before is not None:
        after = _settled(plan.metrics_url, before, summary)
        server = reconcile.server_side(before, after)
        use = device_use(device, [before, *during, after])
    return Run(
        load=dataclasses.asdict(load),
        workload=plan.workload,
        warmup=warmup,
        interrupted=outcome.interrupted,
        objections=validity.objections(outcome.records, outcome.workers),
        summary=summary,
        workers=outcome.workers,
        server=server,
        disagreements=reconcile.disagreements(summary, server) if server else [],
        requests=result.condense(outcome.records),
        device=use,
    )


def _settled(url: str, before: reconcile.Samples, summary: Summary) -> reconcile.Samples:
    """The server's metrics once it has booked every request and measured its device, or after some time."""
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        after = reconcile.scrape(url)
        booked = reconcile.server_side(before, after).requests >= summary.requests
        if (booked and not to_measure(after)) or time.monotonic() > end:
            return after
        time.sleep(0.1)


def _words(load: Load) -> str:
    if isinstance(load, ClosedLoop):
        return f"{load.concurrency} user{'s' if load.concurrency > 1 else ''}"
    return f"{load.rate:.3g} sessions/s"


@contextmanager
def _watch(console: Console, title: str, requests: int) -> Iterator[driver.Listener]:
    """A live line while a run is under way."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} requests, {task.fields[more]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=requests, more="")
        began = time.monotonic()

        def listen(counts: Counts) -> None:
            rate = counts.tokens / (time.monotonic() - began)
            progress.update(
                task,
                total=max(requests, counts.sent),
                completed=counts.ended,
                more=f"{counts.sent - counts.ended} running, {counts.failed} failed, {rate:.0f} tok/s",
            )

        yield listen
