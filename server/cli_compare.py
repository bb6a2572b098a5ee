"""``longspan compare``: which attention variant should be deployed?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli_shared import UNBROKEN, fail, require_server

_REFUSED = 2
_INTERRUPTED = 130


def compare(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="As for `longspan serve`.")] = None,
    contexts: Annotated[
        list[str] | None,
        typer.Option("--context", help="Lengths in tokens, like 1024,8192; may be repeated."),
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            help="A backend and its options, like 'sliding_window window=512'; may be repeated. "
            "Full attention is always there.",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="More variants, lengths and tasks: an evening, not minutes."),
    ] = False,
    budget: Annotated[
        str | None, typer.Option(help="Time to spend, like 5m or 2h. [default: 5m, with --full 2h]")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Your load: numbers of users, like 1,8; the first decides. [default: 1]")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Your load as sessions per second, instead of users.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Of those that `--task help` lists; may be repeated.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Your own text, UTF-8. Without it: the manual that comes with Python.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="Your own questions, JSONL: a prompt, and what an answer contains, or nothing."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask through the chat template. [default: if there is one]"),
    ] = None,
    margins: Annotated[
        list[str] | None,
        typer.Option("--margin", help="How much may be lost, like perplexity=0.03; may be repeated."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of all intervals and tests.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Keep the result there; the same command goes on from it."),
    ] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report there.")] = None,
    csv_folder: Annotated[
        Path | None, typer.Option("--csv", help="Write every answer, block of text and measurement there.")
    ] = None,
    show: Annotated[Path | None, typer.Option(help="Show this result instead of measuring.")] = None,
    live: Annotated[
        bool, typer.Option("--serve", help="Show the report in a browser while it is being measured.")
    ] = False,
) -> None:
    """Compare attention variants on your model, this machine and your text, and say which to deploy.

    Serves them side by side. What follows -- goes to every `longspan serve`. Ends with 0 if all was measured, 1 if
    a candidate failed meanwhile, 2 if something was refused before.
    """
