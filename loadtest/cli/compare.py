"""``longspan compare``: which attention variant should be deployed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadtest.cli.checks import only_shown, writable
from loadtest.cli.compare_options import REFUSED, list_tasks, numbers, words
from server.cli.shared import fail, require_server
from server.cli.signals import INTERRUPTED, signals_raise

if TYPE_CHECKING:
    from loadtest.compare.plan import Material
    from loadtest.compare.presets import Preset
    from loadtest.compare.types import Comparison, Plan

_ENDING_SECONDS = 5.0
_WIDTH = 100  # of what goes to a file
_WITH_SHOW = ("show", "preset", "full", "margins", "confidence", "html_file", "csv_folder")


def compare(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="As for `longspan serve`.", show_default="its default model")
    ] = None,
    contexts: Annotated[
        list[str] | None,
        typer.Option(
            "--context",
            help="Lengths in tokens, like 1024,8192 or 1k,8k; may be repeated.",
            show_default="quick, known: 1k,4k; full: 1k,2k,4k,8k",
        ),
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            help="A backend and its options, like 'sliding_window window=512'; may be repeated. "
            "Full attention is always there.",
            show_default="quick: a window of 1020 + 4 sinks, top-k 512",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="What is measured where nothing else is asked for. quick: two variants, two lengths. full: "
            "twelve variants, four lengths, all tasks. known: the default model, held against known figures.",
            show_default="quick",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The same as --preset full.")] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Time to spend, like 5m or 2h.", show_default="quick: 5m, full: 2h, known: 10m"),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            help="Your load: users at once; of several, like 1,8, the first decides what is recommended.",
            show_default="1",
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Your load as sessions per second, instead of --concurrency.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Questions with known answers, like needles,vt; `--task help` lists all; may be repeated.",
            show_default="quick: needles; full: all; known: passkey,needles",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Your own text for perplexity, UTF-8, at least as long as the longest context.",
            show_default="the manual that comes with Python",
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help='Your own questions, a JSON object per line: {"prompt": ..., "contains": ...}; instead of '
            "contains also regex, json, or nothing: then answers are compared with full attention's."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Ask through the chat template.", show_default="if there is one"
        ),
    ] = None,
    margins: Annotated[
        list[str] | None,
        typer.Option(
            "--margin",
            help="How much worse than full attention is still safe, like perplexity=0.03; may be repeated.",
            show_default="perplexity=0.05 score=0.05 logprob=0.1 agreement=0.1 effective=0.85 speed=0.05",
        ),
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of all intervals and tests.", show_default="0.95")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of questions, blocks of text and prompts.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Keep the result in this file. Run again, the same command adds to it."),
    ] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the report to this file.")] = None,
    csv_folder: Annotated[
        Path | None,
        typer.Option(
            "--csv", help="Write every answer, block of text and measurement to tables in this folder."
        ),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            help="Show this result instead of measuring, under other --margin and --confidence if given."
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Serve the report to a browser on this machine while it grows; prints its address.",
        ),
    ] = False,
) -> None:
    """Compare attention variants on your model, this machine and your text, and say which to deploy.

    Serves them side by side. What follows -- goes to every `longspan serve`. The exit code is 0 if all
    was measured, whatever the verdict; 1 if a candidate failed meanwhile or could not answer all or, with
    --preset known, a figure is beyond its bound; 2 if something was refused before; 130 if interrupted.
    """
    require_server()
    from loadtest.compare import document
    from loadtest.compare.plan import Asked, PlanError, make_plan, rejudged
    from loadtest.compare.plan import budget as seconds
    from loadtest.document import DocumentError

    chosen = _preset(preset, full)
    if tasks == ["help"]:
        list_tasks()
        return
    writable(json_file, html_file, csv_folder=csv_folder, code=REFUSED)
    if show is not None:
        only_shown(context, _WITH_SHOW, REFUSED)
        try:
            found = document.load(show)
            found.plan = rejudged(found.plan, margins or [], confidence)
            _tell(found, chosen, html_file, csv_folder)
        except (DocumentError, PlanError, OSError) as error:
            fail(str(error), REFUSED)
        return
    try:
        asked = Asked(
            preset=chosen,
            model=model,
            contexts=numbers(contexts or [], "--context"),
            candidates=candidates or [],
            tasks=words(tasks or []),
            concurrency=numbers([concurrency] if concurrency else [], "--concurrency"),
            rate=rate,
            text=text,
            questions=questions,
            chat=chat,
            margins=margins or [],
            confidence=0.95 if confidence is None else confidence,
            seed=seed,
            arguments=context.args,
        )
        plan, material = make_plan(asked)
        _measure(plan, material, chosen, seconds(asked, budget), json_file, html_file, csv_folder, live)
    except PlanError as error:
        fail(str(error), REFUSED)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def _measure(
    plan: Plan,
    material: Material,
    preset: Preset,
    budget: float,
    json_file: Path | None,
    html_file: Path | None,
    csv_folder: Path | None,
    live: bool,
) -> None:
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

    signals_raise()
    began = time.monotonic()
    sentence, code = "", 0
    comparison: Comparison | None = None
    try:
        if json_file is not None and json_file.exists():
            document.load(json_file)  # what is damaged or something else is told before a server starts
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
    _tell(comparison, preset, html_file, csv_folder, sentence, code)
    if not is_whole(comparison):
        raise typer.Exit(1)


def _tell(
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


def _preset(name: str | None, full: bool) -> Preset:
    from loadtest.compare.presets import PRESETS, WHOLE

    if full and name not in (None, WHOLE.name):
        fail(f"--full is --preset full, and --preset {name} is another; give one of them", REFUSED)
    wanted = WHOLE.name if full else name or "quick"
    if wanted not in PRESETS:
        fail(f"there is no preset {wanted!r}; choose from {', '.join(PRESETS)}", REFUSED)
    return PRESETS[wanted]
