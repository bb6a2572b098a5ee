"""The run of ``longspan load`` with its options read: measures, keeps, shows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from server.cli.shared import UNBROKEN, fail, fail_call
from server.cli.signals import INTERRUPTED, signals_raise

if TYPE_CHECKING:
    from loadtest.load.plan import Plan
    from loadtest.load.result import Result
    from loadtest.load.types import Wanted


def run(plan: Plan, wanted: Wanted) -> Result:
    """Measures; a failure or Ctrl-C before the first run ends the command.

    Args:
        plan: what to measure, but for the workload.
        wanted: the workload.
    """
    import dataclasses

    from rich.console import Console

    from loadtest.load.drawing import drawing, known
    from loadtest.load.measure import measure
    from loadtest.load.reconcile import ScrapeError
    from loadtest.load.types import LoadTestError
    from longspan import Client, LongspanError

    signals_raise()
    try:
        with ExitStack() as stack:
            client = None
            if not plan.endpoint_only:
                client = stack.enter_context(Client(plan.host, plan.port, timeout=30, **plan.connect))
            told = None
            if plan.endpoint is not None:
                from loadtest.load import examine

                told = examine.told(plan.endpoint)
            workload, draw = drawing(wanted, known(client, plan.endpoint, told))
            if plan.endpoint is not None:
                examine.try_out(plan.endpoint, draw(1, plan.seed)[0].turns[0], plan.patience)
            plan = dataclasses.replace(plan, workload=workload, draw=draw)
            result = measure(plan, Console(stderr=True))
    except ScrapeError as error:
        fail(f"{error}; name their --metrics-host and --metrics-port, or leave them out with --no-metrics")
    except LoadTestError as error:
        fail(str(error))
    except LongspanError as error:
        fail_call(error)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if not result.runs:
        fail("nothing was measured", INTERRUPTED)
    return result


def tell(
    result: Result, earlier: Result | None, files: Mapping[str, Path | None], *, shown: bool
) -> NoReturn:
    """Writes the files, prints the tables, and ends the command.

    Args:
        result: with a run at least.
        earlier: to compare it with.
        files: to write, by option: ``--json`` the result, ``--html`` a report, ``--csv`` every request,
            ``--svg`` throughput against latency; ``None`` where one is not wanted.
        shown: it was measured before; then only a file that can't be written is a failure.
    """
    from rich.console import Console

    from loadtest.document import write
    from loadtest.load.document import save
    from loadtest.load.measure import STOPPED
    from loadtest.load.rows import clean, rows
    from loadtest.load.table import comparison, runs_table

    unwritten = ""
    try:  # first, since what reads the output may not read all of it
        if file := files["--json"]:
            save(result, file)
        if file := files["--csv"]:
            from loadtest.load.request_rows import save_csv

            save_csv(result, file)
        if file := files["--html"]:
            from loadtest.load.report import render

            write(render(result, earlier), file)
        if file := files["--svg"]:
            from loadtest.load.plots import throughput

            throughput(rows(result), [] if earlier is None else rows(earlier)).write(file)
    except OSError as error:
        unwritten = f"the result can't be written: {error}"
    console = Console()
    piped = not console.is_terminal
    if piped:
        console = Console(width=UNBROKEN)
    console.print(runs_table(result, one_line=piped))
    if earlier is not None:
        console.print(comparison(earlier, result))
    if shown and not unwritten:
        if result.ended:
            typer.echo(result.ended, err=True)
        raise typer.Exit
    if said := "; ".join(filter(None, (result.ended, unwritten))):
        fail(said, INTERRUPTED if result.ended == STOPPED else 1)
    raise typer.Exit(0 if clean(result) else 1)
