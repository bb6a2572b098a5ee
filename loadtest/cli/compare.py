"""``longspan compare``: which attention variant should be deployed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadtest.cli.checks import only_shown, writable
from loadtest.cli.compare_options import REFUSED, list_tasks, numbers, words
from loadtest.cli.compare_run import measure, tell
from server.cli.shared import fail, require_server
from server.cli.signals import INTERRUPTED, signals_raise

if TYPE_CHECKING:
    from loadtest.compare.presets import Preset

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
            help="Lengths in tokens, like 1024,8192 or 1k,8k; may be repeated. Readings take longer ones "
            "than the model's context too.",
            show_default="quick, known: 1k,4k; full: 1k,2k,4k,8k",
        ),
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            help="A backend and its options, like 'sliding_window window=512', or a method of longspan read, "
            "like 'extractive top=8'; may be repeated. Full attention is always there.",
            show_default="quick: a window of 1020 + 4 sinks, top-k 512",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="What is measured where nothing else is asked for. quick: two variants, two lengths. full: "
            "twelve variants, four lengths, all tasks. known: checks known figures of the default model.",
            show_default="quick",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The same as --preset full.")] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Time to spend, like 5m or 2h.", show_default="quick: 5m, full: 2h, known: 20m"),
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
    """Compare attention variants, and say which to deploy.

    Serves them side by side, with your model and your text on this machine. Arguments after -- go to every
    `longspan serve`. The exit code is 0 if all was measured, whatever the verdict; 1 if a candidate failed
    meanwhile or could not answer all or, with --preset known, a figure is beyond its bound; 2 if something
    was refused before; 130 if interrupted.
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
    writable({"--json": json_file, "--html": html_file}, csv_folder, REFUSED)
    if show is not None:
        only_shown(context, _WITH_SHOW, REFUSED)
        try:
            found = document.load(show)
            found.plan = rejudged(found.plan, margins or [], confidence)
            tell(found, chosen, html_file, csv_folder)
        except (DocumentError, PlanError, OSError) as error:
            fail(str(error), REFUSED)
        return
    signals_raise()
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
        measure(plan, material, chosen, seconds(asked, budget), json_file, html_file, csv_folder, live)
    except PlanError as error:
        fail(str(error), REFUSED)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def _preset(name: str | None, full: bool) -> Preset:
    from loadtest.compare.presets import PRESETS, WHOLE

    if full and name not in (None, WHOLE.name):
        fail(f"--full is --preset full, and --preset {name} is another; give one of them", REFUSED)
    wanted = WHOLE.name if full else name or "quick"
    if wanted not in PRESETS:
        fail(f"there is no preset {wanted!r}; choose from {', '.join(PRESETS)}", REFUSED)
    return PRESETS[wanted]
