"""The run of ``longspan compare`` with its options read: measures and keeps, or shows a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from loadtest.cli.compare_options import REFUSED
from server.cli.shared import fail
from server.cli.signals import INTERRUPTED

if TYPE_CHECKING:
    from loadtest.compare.plan import Material
    from loadtest.compare.presets import Preset
    from loadtest.compare.types import Comparison, Plan

_ENDING_SECONDS = 5.0
_WIDTH = 100  # of what goes to a file


def measure(
    plan: Plan,
    material: Material,
    preset: Preset,
    budget: float,
    json_file: Path | None,
    html_file: Path | None,
    csv_folder: Path | None,
    live: bool,
) -> None:
    """Measures, keeps what was measured, and tells of it, also after Ctrl-C.

    Args:
        plan: what is compared.
        material: texts and questions.
        preset: that was asked for.
        budget: seconds for all of it.
        json_file: of the result; a result that is there goes on.
        html_file: of the report.
        csv_folder: of the tables.
        live: serve the report meanwhile.

    Raises:
        loadtest.compare.plan.PlanError: it cannot be measured so.
        typer.Exit: the exit code is not 0.
    """
    import time
    from datetime import UTC, datetime

    from loadtest.cli.compare_progress import Watcher
    from loadtest.compare import document
    from loadtest.compare.equal import equal_pairs
    from loadtest.compare.estimate import already, outlook, refusal
    from loadtest.compare.evidence import is_whole
    from loadtest.compare.group import FullFailedError
    from loadtest.compare.plan import PlanError
    from loadtest.compare.preflight import describe, look
    from loadtest.compare.run import run
    from loadtest.compare.types import Comparison
    from loadtest.document import DocumentError, machine
    from loadtest.measuring.busy import busy

    began = time.monotonic()
    sentence, code = "", 0
    comparison: Comparison | None = None
    try:
        if json_file is not None and json_file.exists():
            document.load(json_file)  # a damaged or foreign file is refused before a server starts
        with Watcher(budget, json_file, live) as watcher:
            try:
                watcher.say(describe(plan))
                found = look(plan, material, watcher.doing)
                comparison = Comparison(
                    found.plan,
                    datetime.now(UTC).isoformat(timespec="seconds"),
                    machine(),
                    found.versions,
                    found.model,
                    budget=budget,
                )
                if json_file is not None:
                    comparison = document.join(comparison, json_file)
                watcher.watch(comparison)
                spent = time.monotonic() - began
                least = found.needs.start + found.needs.least
                if not comparison.spent and least > budget - spent - _ENDING_SECONDS:
                    raise PlanError(refusal(found.needs, budget, spent, plan.confidence))
                estimates = outlook(found.needs, budget, spent, plan.confidence)
                for line in [*already(comparison), *estimates]:
                    watcher.say(line)
                # The servers take a moment to end.
                run(comparison, found, material, began + budget - _ENDING_SECONDS, watcher.listener)
            except FullFailedError as error:
                sentence, code = str(error), 1
            except KeyboardInterrupt:
                more = (
                    f"the same command goes on from {json_file}"
                    if json_file
                    else "with --json it could go on"
                )
                sentence, code = f"interrupted; {more}", INTERRUPTED
            if comparison is not None:  # the last judgment may be older than the last rows
                comparison.busy = busy(comparison.speed, equal_pairs(comparison), comparison.plan.confidence)
            if unsaved := watcher.keep():
                sentence, code = "\n".join(filter(None, (sentence, unsaved))), code or 1
    except DocumentError as error:
        fail(str(error), REFUSED)
    if comparison is None or not (
        comparison.speed or comparison.answers or comparison.text or comparison.failed
    ):
        if code == INTERRUPTED:
            sentence = "interrupted before anything was measured"
        over = (
            f"the budget of {budget:g} seconds was over before anything was measured; give a longer --budget"
        )
        fail(sentence or over, code or 1)
    tell(comparison, preset, html_file, csv_folder, sentence, code)
    if not is_whole(comparison):
        raise typer.Exit(1)


def tell(
    comparison: Comparison,
    preset: Preset,
    html_file: Path | None,
    csv_folder: Path | None,
    sentence: str = "",
    code: int = 0,
) -> None:
    """Writes and prints all of it; ends with 1 if a figure is not as it is known to be.

    Args:
        comparison: what there is.
        preset: that was measured.
        html_file: of the report.
        csv_folder: of the tables.
        sentence: what went wrong meanwhile, to be said last.
        code: the exit code for it.

    Raises:
        typer.Exit: the code is not 0.
    """
    from rich.console import Console

    from loadtest.compare import csv, holding
    from loadtest.compare.judge import judge
    from loadtest.compare.presets import KNOWN
    from loadtest.compare.table import table
    from loadtest.document import write
    from loadtest.report.compare import render

    judgment = judge(comparison)
    unwritten = ""
    try:  # first, since what reads the output may not read all of it
        if html_file is not None:
            write(render(comparison, judgment), html_file)
        if csv_folder is not None:
            csv.write(comparison, csv_folder)
    except OSError as error:
        unwritten = f"the result can't be written: {error}"
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(table(comparison, judgment))
    failed = False
    if preset is KNOWN:
        findings = holding.hold(comparison)
        console.print(holding.table(findings))
        failed = holding.has_failed(findings)
    if sentence or unwritten:
        fail("\n".join(filter(None, (sentence, unwritten))), code or 1)
    if failed:
        raise typer.Exit(1)
