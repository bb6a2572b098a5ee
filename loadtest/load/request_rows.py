"""Every request of a load test as a row of CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from loadtest.load.result import Result, Run

COLUMNS = (
    *("label", "target", "load", "concurrency", "rate", "repeat", "seed", "session", "turn"),
    *("intended", "sent", "first", "last", "ended", "ttft", "tpot", "latency"),
    *("prompt_tokens", "cached_tokens", "output_tokens", "expected_tokens", "code", "error"),
)
"""The header. Times are seconds, from the run's first request; what was not measured is empty."""


def save_csv(result: Result, path: Path) -> None:
    """Writes all requests of all runs, in the order in which they were sent.

    Raises:
        OSError: the file can't be written.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(_row(run, request) for run in result.runs for request in run.requests)


def _row(run: Run, request: dict[str, Any]) -> dict[str, Any]:
    first, last, tokens = request["first"], request["last"], request["output_tokens"]
    return {
        **request,
        "label": run.label,
        "target": run.target,
        "load": run.load["kind"],
        "concurrency": run.load.get("concurrency", ""),
        "rate": run.load.get("rate", ""),
        "repeat": run.repeat,
        "seed": run.seed,
        "ttft": "" if first is None else round(first - request["sent"], 6),
        "tpot": "" if first == last else round((last - first) / (tokens - 1), 9),
        "latency": round(request["ended"] - request["sent"], 6),
    }
