"""Loads, one or a sweep, on one target or two: measured by the core in passes there and back, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from rich.console import Console

from loadtest import document
from loadtest.load.cell import Cell, StoppedError
from loadtest.load.plan import Plan
from loadtest.load.result import Result
from loadtest.load.sweep import Sweep
from loadtest.load.targets import Endpoint
from loadtest.load.worker import loop_name
from loadtest.measuring import weather
from loadtest.measuring.rounds import MOST_REPEATS, Progress, Rounds
from loadtest.measuring.weather import Observe
from longspan import Client

__all__ = ["Plan", "describe", "measure"]


class NotMeasuredError(RuntimeError):
    """A run could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """The core's load: a pass over all cells, which have loads of their own."""

    label: str = "pass"


_PASS = _Pass()

_UNKNOWN = (
    "what else used this machine was not watched: the server's processes can't be told from others; run "
    "longspan load as the server's user"
)


def measure(plan: Plan, console: Console, observe: Observe = weather.observe) -> Result:
    """Runs the plan, with live progress on ``console``. Ctrl-C ends the run under way and the plan.

    A round of the measuring core is two passes over all cells, there and back. A run that other work on this
    machine disturbs is measured again, but not where there are no repeats: then it only says so.

    Args:
        plan: what to measure.
        console: for progress.
        observe: how the machine is watched.

    Raises:
        longspan.LongspanError: the server does not answer.
        reconcile.ScrapeError: its metrics can't be read.
        driver.WorkerDiedError: a client process failed.
        NotMeasuredError: a run could not be made.
    """
    found = describe(plan)
    cells: list[Cell] = []
    try:
        for number, load in enumerate(plan.loads):
            own = [
                Cell(plan, target, load, number, found.server.get("device", ""), console, found.runs.append)
                for target in plan.measured[:: -1 if number % 2 else 1]
            ]
            cells += own
            if not number and any(target.local for target in plan.measured):
                found.notes += [] if all(cell.pids for cell in own) else [_UNKNOWN]
            first = len(found.runs)
            _pass(found, own, 0, plan.repeats, observe)
            if isinstance(plan.loads, Sweep):
                name = plan.measured[0].name
                plan.loads.learn([run for run in found.runs[first:] if run.target == name][-1].summary)
        for repeat in range(1, plan.repeats):
            _pass(found, cells, repeat, plan.repeats, observe)
    except StoppedError:
        pass
    return found


def _pass(
    found: Result,
    cells: Sequence[Cell],
    repeat: int,
    repeats: int,
    observe: Observe,
) -> None:
    """One pass over cells; each run learns where in the whole it belongs, and what the weather was."""
    first = len(found.runs)
    known = all(cell.pids for cell in cells)

    def tell(progress: Progress) -> None:
        if known and not progress.last.error:
            run, last = found.runs[-1], progress.last
            run.attempt, run.weather, run.disturbed = last.attempt, last.weather, last.disturbed

    for cell in cells:
        cell.prefix = f"{repeat + 1} of {repeats}: " if repeats > 1 else ""
    rounds = Rounds({cell.name: cell for cell in cells}, [_PASS], tell=tell, observe=observe)
    # Where all of the last pass was disturbed, this one will be too, and would only take three times as long.
    hopeless = first > 0 and all(run.disturbed for run in found.runs if run.repeat == repeat - 1)
    again = MOST_REPEATS if known and repeats > 1 and not (repeat and hopeless) else 0
    try:
        rounds.half(_PASS, repeat // 2, repeat % 2, again)
    finally:
        for run in found.runs[first:]:
            run.repeat = repeat
    for why in rounds.failed.values():
        raise NotMeasuredError(why)


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
