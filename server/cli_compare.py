"""``longspan compare``: which attention variant should be deployed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli_shared import UNBROKEN, fail, require_server

if TYPE_CHECKING:
    from loadtest.compare.types import Plan

_QUICK_CONTEXTS = (1024, 4096)
_WHOLE_CONTEXTS = (1024, 2048, 4096, 8192)


def compare(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="As for `longspan serve`.")] = None,
    contexts: Annotated[
        list[int] | None, typer.Option("--context", min=256, help="Length in tokens; may be repeated.")
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
        typer.Option("--full", help="More candidates, contexts, text and needles: an evening, not minutes."),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Your own text, UTF-8. Without it: the manual that comes with Python.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Your own prompts, one per line: whose answers change?")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Keep the result there; an interrupted comparison goes on from it."),
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with plots there; needs the extra load.")
    ] = None,
) -> None:
    """Compare attention variants on your model, this machine and your text, and say which to deploy.

    Starts a server for each, one after the other. What follows -- goes to every `longspan serve`.
    """
    require_server()
    from loadtest.quality import text as texts
    from server.cli_load import require_plots

    if html_file is not None:
        require_plots()
    try:
        content = texts.prose(texts.reference()) if text is None else texts.read(text)
        asked = () if prompts is None else tuple(filter(None, texts.read(prompts).splitlines()))
        plan = _plan(context.args, model, contexts, candidates, full, text, content, asked)
    except (OSError, ValueError) as error:
        fail(str(error))
    _run(plan, content, json_file, html_file)


def _plan(
    arguments: list[str],
    model: str | None,
    contexts: list[int] | None,
    candidates: list[str] | None,
    full: bool,
    text: Path | None,
    content: str,
    prompts: tuple[str, ...],
) -> Plan:
    import hashlib

    from loadtest.compare.candidates import QUICK, WHOLE, parse
    from loadtest.compare.types import Plan

    chosen = tuple(parse(candidate) for candidate in candidates) if candidates else None
    lengths = tuple(sorted(set(contexts))) if contexts else _WHOLE_CONTEXTS if full else _QUICK_CONTEXTS
    return Plan(
        candidates=(WHOLE if full else QUICK) if chosen is None else (QUICK[0], *chosen),
        contexts=lengths,
        text="the manual that comes with Python" if text is None else str(text),
        text_hash=hashlib.sha256(content.encode()).hexdigest()[:16],
        depths=(0.1, 0.5, 0.98),
        keys_per_depth=4 if full else 1,
        slices=2 if full else 1,
        output_tokens=64 if full else 24,
        prompts=prompts,
        arguments=(*(("--model", model) if model else ()), *arguments),
    )


def _run(plan: Plan, content: str, json_file: Path | None, html_file: Path | None) -> None:
    from datetime import UTC, datetime

    from rich.console import Console

    from loadtest.compare import document
    from loadtest.compare.measure import Measurer
    from loadtest.compare.table import table
    from loadtest.compare.types import Comparison
    from loadtest.load.result import machine

    comparison = Comparison(plan, datetime.now(UTC).isoformat(timespec="seconds"), machine())
    progress = Console(stderr=True)

    def keep() -> None:
        if json_file is not None:
            document.save(comparison, json_file)

    try:
        if json_file is not None:
            comparison = document.go_on_with(comparison, json_file)
        Measurer(comparison, content, lambda words: progress.print(words, style="dim"), keep).run()
    except (document.DocumentError, ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        kept = f"; the same command goes on from {json_file}" if json_file else "; with --json it could go on"
        fail(f"interrupted{kept}", 130)
    keep()
    console = Console()
    if not console.is_terminal:
        console = Console(width=UNBROKEN)
    console.print(table(comparison))
    if html_file is not None:
        from loadtest.compare.report import write_report

        write_report(comparison, html_file)
