"""Loads, one or a sweep, on one target or two: measured by the core in passes there and back, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from rich.console import Console

from loadtest import document
from loadtest.load.cell import Cell, StoppedError
from loadtest.load.driver import WorkerDiedError
from loadtest.load.passes import NotMeasuredError, one_pass
from loadtest.load.plan import Plan
from loadtest.load.reconcile import ScrapeError
from loadtest.load.result import Result
from loadtest.load.sweep import Sweep
from loadtest.load.targets import Endpoint, Target
from loadtest.measuring import weather
from loadtest.measuring.loops import loop_name
from loadtest.measuring.weather import Observe
from longspan import Client, UnimplementedError
from longspan.v1 import inference_pb2

STOPPED = "it was stopped before all was measured"
_UNTOLD = (
    "what else used this machine was not watched while {name} was measured: its processes can't be told from "
    "others; run longspan load as its user"
)
_ELSEWHERE = "what else used the machine of {name} was not watched: it is not this one"


def measure(
    plan: Plan, console: Console, observe: Observe = weather.observe, others: Sequence[Plan] = ()
) -> Result:
    """Runs the plan, with live progress on ``console``. Ctrl-C ends the run under way and the plan.

    A round of the measuring core is two passes over all cells, there and back. A run that other work on this
    machine disturbs is measured again, but not where there are no repeats: then it only says so.

    Args:
        plan: what to measure.
        console: for progress.
        observe: how the machine is watched.
        others: further workloads for the same server, in the same passes.

    Returns:
        The measurements; where they are not all of the plan, ``ended`` says why.

    Raises:
        longspan.LongspanError: the server does not answer.
        reconcile.ScrapeError: its metrics can't be read, from the first run on.
        driver.WorkerDiedError: a client process of the first run failed.
        NotMeasuredError: the first run could not be made.
    """
    found = describe(plan)
    cells: list[Cell] = []
    try:
        loads = ((each, load) for each in (plan, *others) for load in each.loads)
        for number, (each, load) in enumerate(loads):
            own = [
                Cell(each, target, load, number, found.server.get("device", ""), console, found.runs.append)
                for target in plan.measured[:: -1 if number % 2 else 1]
            ]
            cells += own
            if not number:
                found.notes += _unwatched(plan.measured, own)
            first = len(found.runs)
            one_pass(found, own, 0, plan.repeats, observe)
            if isinstance(plan.loads, Sweep):
                name = plan.measured[0].name
                plan.loads.add([run for run in found.runs[first:] if run.target == name][-1].summary)
        for repeat in range(1, plan.repeats):
            one_pass(found, cells, repeat, plan.repeats, observe)
    except (StoppedError, KeyboardInterrupt):
        found.ended = STOPPED
    except (ScrapeError, WorkerDiedError, NotMeasuredError) as error:
        if not found.runs:
            raise
        found.ended = f"it ended before all was measured: {error}"
    return found


def _unwatched(targets: Sequence[Target], cells: Sequence[Cell]) -> list[str]:
    """Targets whose disturbances can't be told, in words; nothing where all are on another machine."""
    if not any(target.local for target in targets):
        return []
    return [
        (_UNTOLD if target.local else _ELSEWHERE).format(name=target.name)
        for target, cell in zip(targets, cells, strict=True)
        if cell.pids is None
    ]


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
    if plan.endpoint_only:
        return found
    with Client(plan.host, plan.port, timeout=30, **plan.connect) as client:
        model = client.model_info()
        try:
            info = client.server_info()
        except UnimplementedError:  # switched off (--no-server-info)
            info = inference_pb2.GetServerInfoResponse()
    attention = model.attention
    found.versions = {"longspan": info.version or "not told", **found.versions, **info.versions}
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
