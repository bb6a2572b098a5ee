"""One load or a sweep of them: measured, checked against the server's metrics, and kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest import document
from loadtest.load import driver, reconcile, result, validity
from loadtest.load.device import device_use, to_measure, watched
from loadtest.load.measures import summarize
from loadtest.load.result import Result, Run
from loadtest.load.sweep import Sweep
from loadtest.load.targets import Endpoint, Server, Target
from loadtest.load.types import ClosedLoop, Load, Session, Summary, Targets
from loadtest.load.worker import Progress as Counts
from loadtest.load.worker import loop_name
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
        repeats: of every load, there and back.
        endpoint: a second target, which takes turns with the server.
        alone: the endpoint is the only target.
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
    repeats: int = 1
    endpoint: Endpoint | None = None
    alone: bool = False

    @property
    def measured(self) -> list[Target]:
        """What is measured."""
        server = [] if self.alone else [Server(self.host, self.port)]
        return [*server, *([self.endpoint] if self.endpoint else [])]


class Cell(NamedTuple):
    """One run to make.

    Attributes:
        target: what to measure.
        load: what to put on it.
        repeat: from 0.
        seed: of sessions and arrivals; the same for all targets, which get the same prompts.
    """

    target: Target
    load: Load
    repeat: int
    seed: int


def measure(plan: Plan, console: Console) -> Result:
    """Runs the plan, with live progress on ``console``. Ctrl-C ends the run under way and the plan.

    Raises:
        longspan.LongspanError: the server does not answer.
        reconcile.ScrapeError: its metrics can't be read.
        driver.WorkerDiedError: a client process failed.
    """
    found = describe(plan)
    loads: list[Load] = []
    number = 0
    for repeat in range(plan.repeats):
        # There and back: what drifts evenly over the whole time falls on all loads alike.
        for load in plan.loads if not repeat else loads[:: -1 if repeat % 2 else 1]:
            if not repeat:
                loads.append(load)
            targets = plan.measured[:: -1 if (repeat + number) % 2 else 1]
            for target in targets:
                cell = Cell(target, load, repeat, plan.seed + _SEEDS_PER_RUN * number)
                run = _run(plan, cell, found.server.get("device", ""), console)
                if run is None:
                    return found
                found.runs.append(run)
                if isinstance(plan.loads, Sweep) and not repeat and target == plan.measured[0]:
                    plan.loads.learn(run.summary)
                if run.interrupted:
                    return found
            number += 1
    return found


def describe(plan: Plan) -> Result:
    """A result without runs: the machine, the server, and the endpoint."""
    found = Result(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=plan.seed,
        machine={**document.machine(), "loop": loop_name()},
        versions={"client": version("longspan")},
        server={},
        runs=[],
        peers={target.name: target.described() for target in plan.measured if isinstance(target, Endpoint)},
    )
    if plan.alone:
        return found
    with Client(plan.host, plan.port, timeout=30) as client:
        model, info = client.model_info(), client.server_info()
    attention = model.attention
    found.versions = {"longspan": info.version, **found.versions, **info.versions}
    found.server = {
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
    }
    return found


def _counts(plan: Plan, load: Load) -> tuple[int, int, int]:
    """Sessions of a run, and of its warm-up, and users of the warm-up."""
    users = load.concurrency if isinstance(load, ClosedLoop) else 4
    usual = max(16, 4 * users if isinstance(load, ClosedLoop) else round(_OPEN_SECONDS * load.rate))
    warmup = users if plan.warmup is None else plan.warmup
    # Fewer sessions than users would measure fewer users.
    least = users if isinstance(load, ClosedLoop) else 1
    return max(plan.sessions or usual, least), warmup, max(1, min(users, warmup))


def _run(plan: Plan, cell: Cell, device: str, console: Console) -> Run | None:
    """One run after its warm-up; ``None`` if it was stopped before any request."""
    target, load, seed = cell.target, cell.load, cell.seed
    count, warmup, users = _counts(plan, load)
    sessions = plan.draw(count, seed)
    title = _title(plan, cell)
    if warmup:
        warm = plan.draw(warmup, seed + 5)
        with _watch(console, f"warm-up for {title}", len(warm)) as listener:
            outcome = driver.run(target, warm, ClosedLoop(users), workers=plan.workers, listener=listener)
        if outcome.interrupted:
            return None
    url = plan.metrics_url if isinstance(target, Server) else None
    before = reconcile.scrape(url) if url else None
    requests = sum(len(session.turns) for session in sessions)
    with _watch(console, title, requests) as listener, watched(url) as during:
        outcome = driver.run(
            target,
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
    if url and before is not None:
        after = _settled(url, before, summary)
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
        disagreements=(reconcile.disagreements(summary, server) if server else reconcile.miscounts(summary)),
        requests=result.condense(outcome.records),
        device=use,
        target=target.name,
        repeat=cell.repeat,
        seed=seed,
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


def _title(plan: Plan, cell: Cell) -> str:
    """What a progress line calls a run."""
    repeat = f"{cell.repeat + 1} of {plan.repeats}: " if plan.repeats > 1 else ""
    return repeat + _words(cell.load) + (f" on {cell.target.name}" if plan.endpoint else "")


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
