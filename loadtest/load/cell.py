"""One load on one target: a run, each time that it is measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.load import driver, reconcile, result, validity
from loadtest.load.device import device_use, watched
from loadtest.load.measures import summarize
from loadtest.load.plan import Plan
from loadtest.load.result import Run, load_label
from loadtest.load.rows import FIGURES
from loadtest.load.targets import Server, Target
from loadtest.load.types import ClosedLoop, Load, Summary
from loadtest.load.worker import SILENT, why_silent
from loadtest.load.worker import Progress as Counts
from loadtest.measuring.listening import processes_on
from loadtest.measuring.types import CannotMeasureError
from longspan import ConnectOptions

# The server books a request just after its last message.
_SETTLE_SECONDS = 3.0
# Workloads use a few seeds from the one that they are given.
_SEEDS_PER_RUN = 10
# More loads than a sweep has.
_SEEDS_PER_PASS = 1000


class StoppedError(Exception):
    """The run was stopped by Ctrl-C; what there is of it is kept."""


class Cell:
    """A target of the measuring core, which puts one load on one server or endpoint.

    Args:
        plan: of the whole.
        target: what to measure.
        load: what to put on it.
        number: of the load in the plan, from 0. Each load has prompts of its own, so that no prefix cache
            knows those of one from another; all targets get the same.
        device: of the server, as it says.
        console: for progress.
        keep: given each run.

    Attributes:
        pids: processes of the target on this machine; ``None`` if they can't be told, or it
            is on another.
        prefix: of progress lines.
    """

    def __init__(
        self,
        plan: Plan,
        target: Target,
        load: Load,
        number: int,
        device: str,
        console: Console,
        keep: Callable[[Run], None],
    ) -> None:
        self._plan, self._target, self._load, self._number = plan, target, load, number
        self._device, self._console, self._keep = device, console, keep
        self.prefix = ""
        self.pids = (processes_on(target.port) or None) if target.local else None

    @property
    def name(self) -> str:
        """Load and target."""
        words = load_label(dataclasses.asdict(self._load))
        return words + (f" on {self._target.name}" if self._plan.endpoint else "")

    def measure(self, load: object, seed: int) -> Mapping[str, float]:
        """One run after its warm-up; its figures by key.

        Args:
            load: no matter; a cell has its own.
            seed: of the pass.

        Raises:
            StoppedError: Ctrl-C; KeyboardInterrupt likewise, where nothing was cut short.
            reconcile.ScrapeError: the server's metrics can't be read; a run that was made is kept.
            CannotMeasureError: the target hangs.
        """
        plan, target = self._plan, self._target
        count, warmup, users = plan.counts(self._load)
        seed = plan.seed + _SEEDS_PER_PASS * seed + _SEEDS_PER_RUN * self._number
        sessions = plan.draw(count, seed)
        send = partial(driver.run, target, workers=plan.workers, patience=plan.patience)
        if warmup:
            warm = plan.draw(warmup, seed + 5)
            with _watch(self._console, f"{self.prefix}warm-up for {self.name}", len(warm)) as listener:
                outcome = send(warm, ClosedLoop(users), listener=listener)
            if outcome.interrupted:
                raise StoppedError
            self._refuse_silence(outcome)
        url = plan.metrics_url if isinstance(target, Server) else None
        before = reconcile.scrape(url, plan.connect) if url else None
        requests = sum(len(session.turns) for session in sessions)
        with (
            _watch(self._console, self.prefix + self.name, requests) as listener,
            watched(url, plan.connect) as during,
        ):
            outcome = send(sessions, self._load, seed=seed, most_seconds=plan.most_seconds, listener=listener)
        if not outcome.records:
            raise StoppedError
        summary = summarize(outcome.records, plan.targets)
        server = use = failure = None
        if url and before is not None:
            try:
                after = _settled(url, plan.connect, before, summary)
                server = reconcile.server_side(before, after)
                use = device_use(self._device, [before, *during, after])
            except (reconcile.ScrapeError, KeyboardInterrupt) as error:
                failure = error
        run = Run(
            load=dataclasses.asdict(self._load),
            workload=plan.workload,
            warmup=warmup,
            interrupted=outcome.interrupted,
            objections=validity.objections(outcome.records, outcome.workers),
            summary=summary,
            workers=outcome.workers,
            server=server,
            disagreements=(
                reconcile.disagreements(summary, server) if server else reconcile.miscounts(summary)
            ),
            requests=result.condense(outcome.records),
            device=use,
            target=target.name,
            seed=seed,
        )
        self._keep(run)
        if outcome.interrupted:
            raise StoppedError
        self._refuse_silence(outcome)
        if failure is not None:
            raise failure
        return {figure.key: figure.get(summary) for figure in FIGURES}

    def _refuse_silence(self, outcome: driver.Outcome) -> None:
        if any(record.code == SILENT for record in outcome.records):
            raise CannotMeasureError(f"{self.name}: {why_silent(self._plan.patience)}")


def _settled(
    url: str, connect: ConnectOptions, before: reconcile.Samples, summary: Summary
) -> reconcile.Samples:
    """The server's metrics once it has booked every request, or after some time."""
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        after = reconcile.scrape(url, connect)
        booked = reconcile.server_side(before, after).requests >= summary.requests
        if booked or time.monotonic() > end:
            return after
        time.sleep(0.1)


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
