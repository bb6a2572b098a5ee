"""Whether hostile messages that four clients repeat hold up other clients; ends with 1 if they do.

A real server has two streams and is asked for health and metrics all the time: with nothing beside them,
and beside each message of tests/e2e/hostile.py. Messages that are computed are compared with ordinary work
of their kind, all others with nothing. A process of its own sends them, so that its interpreter's lock
delays no figure.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from loadtest.columns import Columns
from longspan.v1 import inference_pb2
from tests.e2e import hostile
from tests.e2e.server import Server
from tests.soak.bounds import Bound, p99

MOST_RATIO, MOST_SECONDS, MOST_GROWN = 3.0, 0.05, 300 << 20
NOTHING = "nothing"
_TEMPLATE = "a chat template that does not end"
_ANSWERS = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}


class Case(NamedTuple):
    """A message.

    Attributes:
        name: what it is.
        method: that takes it.
        payload: its bytes.
        against: the name of the case that streams' gaps are compared with; ``None`` of ordinary work.
    """

    name: str
    method: str
    payload: bytes
    against: str | None = NOTHING


@dataclass(frozen=True)
class Row:
    """What others saw beside one message.

    Attributes:
        name: what the message is.
        against: the name of the row that gaps are compared with, if any.
        answers: of the message, by status; none of ``NOTHING``.
        gap: 99th percentile of the seconds between two deltas of a stream.
        gap_worst: the longest of them.
        health: 99th percentile of the seconds that health took.
        health_worst: the longest of them.
        metrics_worst: seconds that the slowest scrape took.
        grown: bytes that the server process's memory grew by, at its largest. What an earlier message left
            with the allocator counts for that one.
    """

    name: str
    against: str | None
    answers: dict[str, int]
    gap: float
    gap_worst: float
    health: float
    health_worst: float
    metrics_worst: float
    grown: int

    @classmethod
    def of(cls, name: str, against: str | None, seen: hostile.Seen, answers: Counter[str]) -> Row:
        """From what was seen."""
        return cls(
            name,
            against,
            dict(answers),
            p99(seen.gaps),
            max(seen.gaps),
            p99(seen.health),
            max(seen.health),
            max(seen.metrics),
            seen.grown,
        )


def cases(of: inference_pb2.GetModelInfoResponse) -> Iterator[Case]:
    """All messages, for a server with ``hostile.ENDLESS_TEMPLATE``."""
    for name, (method, fixed) in hostile.REFUSED.items():
        yield Case(name, method, fixed())
    for name, (method, fitted) in hostile.TAKEN.items():
        against = NOTHING
        if name in hostile.PLAIN:
            against, plain = hostile.PLAIN[name]
            yield Case(against, method, plain(of), against=None)
        yield Case(name, method, fitted(of), against)
    yield Case(_TEMPLATE, "Generate", hostile.chat("loop"))


def run(seconds: float, server: Sequence[str], only: Sequence[str] = ()) -> list[Row]:
    """Rows of all messages, or of those named and what they are compared with; the first is of ``NOTHING``.

    Each is sent for ``seconds``. Quiet windows of a quarter of that stand before each message, so that a
    machine that changes its speed changes both. Their gap is the median of the windows', which what a message
    leaves running can't move.
    """
    rows, quiet = [], []
    named = {*only, *(hostile.PLAIN[name][0] for name in only if name in hostile.PLAIN)}
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder, "endless.jinja")
        template.write_text(hostile.ENDLESS_TEMPLATE)
        # Without the prefix cache a prompt that is repeated is computed each time; the checks, which tests
        # have after every step, would count as part of quiet gaps.
        own = ["--no-prefix-cache", "--no-check-integrity"]
        spawn = multiprocessing.get_context("spawn")
        with (
            Server("--chat-template", template, *own, *server) as running,
            ProcessPoolExecutor(1, spawn) as sender,
        ):
            with running.client() as client:
                info = client.model_info()
            sender.submit(hostile.chat, "x").result()  # imports, which no window should have beside it
            for case in cases(info):
                if named and case.name not in named:
                    continue
                with hostile.watched(running, streams=2) as seen:
                    time.sleep(seconds / 4)
                quiet.append(Row.of(NOTHING, None, seen, Counter()))
                often: dict[str, Any] = {"times": 1, "seconds": seconds, "timeout": seconds}
                with hostile.watched(running, streams=2) as seen:
                    answers = sender.submit(
                        hostile.send, running.address, case.method, case.payload, **often
                    ).result()
                rows.append(Row.of(case.name, case.against, seen, answers))
    return [_together(quiet), *rows]


def _together(quiet: Sequence[Row]) -> Row:
    return Row(
        NOTHING,
        None,
        {},
        gap=statistics.median(row.gap for row in quiet),
        gap_worst=max(row.gap_worst for row in quiet),
        health=statistics.median(row.health for row in quiet),
        health_worst=max(row.health_worst for row in quiet),
        metrics_worst=max(row.metrics_worst for row in quiet),
        grown=max(row.grown for row in quiet),
    )


def judge(rows: Sequence[Row]) -> list[Bound]:
    """All bounds, broken ones included."""
    gaps = {row.name: row.gap for row in rows}
    return [bound for row in rows for bound in _bounds(row, gaps.get(row.against or ""))]


def _bounds(row: Row, ordinary: float | None) -> Iterator[Bound]:
    def bound(what: str, found: str, wanted: str, holds: bool) -> Bound:
        return Bound(f"{row.name}: {what}", found, wanted, holds)

    if ordinary is not None:
        most = f"at most {MOST_RATIO:g} times {_ms(ordinary)} ms"
        yield bound("gaps", f"p99 {_ms(row.gap)} ms", most, row.gap <= MOST_RATIO * ordinary)
    if row.name != NOTHING:
        taken = bool(row.answers) and row.answers.keys() <= _ANSWERS
        yield bound("answers", f"{row.answers}", " or ".join(sorted(_ANSWERS)), taken)
    for what, worst in (("health", row.health_worst), ("metrics", row.metrics_worst)):
        yield bound(
            what, f"{_ms(worst)} ms at worst", f"at most {_ms(MOST_SECONDS)} ms", worst <= MOST_SECONDS
        )
    yield bound(
        "memory",
        f"grown by {row.grown >> 20} MiB",
        f"at most {MOST_GROWN >> 20} MiB",
        row.grown <= MOST_GROWN,
    )


def table(rows: Sequence[Row]) -> Columns:
    """The figures for people; x: by what the gap is longer than beside nothing, or beside the row above."""
    gaps = {row.name: row.gap for row in rows}
    heads = ["sent", "gap\np99\nms", "x", "health\np99\nms", "\nmax\nms", "metrics\nmax\nms", "grown\n\nMiB"]
    shown = Columns("beside", heads)
    for row in rows:
        shown.add_row(
            "\n".join(
                [row.name, *(f"  {status} {count:,}" for status, count in sorted(row.answers.items()))]
            ),
            f"{sum(row.answers.values()):,}",
            _ms(row.gap),
            "" if row.against is None else f"{row.gap / gaps[row.against]:.1f}",
            _ms(row.health),
            _ms(row.health_worst),
            _ms(row.metrics_worst),
            f"{row.grown >> 20}",
        )
    return shown


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.isolation", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each message is sent for [5]")
    parser.add_argument("--only", action="append", default=[], help="a message, by its name in the table")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("server", nargs="*", help="after --, further options of longspan serve")
    options = parser.parse_args()
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds: is {options.seconds:g}; it must be a number above 0")
    known = [*hostile.REFUSED, *hostile.TAKEN, *(name for name, _ in hostile.PLAIN.values()), _TEMPLATE]
    if unknown := set(options.only) - set(known):
        parser.error(f"--only: there is no {unknown.pop()!r}; there are {', '.join(known)}")
    rows = run(options.seconds, options.server, options.only)
    bounds = judge(rows)
    if options.json:
        figures = {"rows": [asdict(row) for row in rows], "bounds": [bound._asdict() for bound in bounds]}
        options.json.write_text(json.dumps(figures, indent=1))
    Console(width=80).print(table(rows))
    for bound in bounds:
        if not bound.holds:
            print(f"broken: {bound.name}: {bound.found}, wanted {bound.wanted}", file=sys.stderr)
    return int(not all(bound.holds for bound in bounds))


if __name__ == "__main__":
    sys.exit(main())
