"""What must hold of a run. A bound on what never happened does not hold either."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from tests.soak.inputs import FIELDS
from tests.soak.record import Memory, Record

_MIB = 1 << 20
_BUGS = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
_LET_IN = ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")
# Memory of shorter series says more of warming up than of growth.
_SERIES_SECONDS = 240.0
# A connection that a client has just closed may not be closed on this side.
_DESCRIPTORS = 8


@dataclass(frozen=True)
class Limits:
    """What the machine and the length of a run allow.

    Attributes:
        answers: real calls answered in each window, at least.
        hostile: inputs in all, at least.
        gap: p99 between deltas in a window, seconds.
        health: p99 of its answers in a window, seconds.
        noticed: seconds after which streams of a lost engine have ended.
        ready: seconds after which another engine answers.
        growth: MiB per hour of either process; ``None`` in a run too short to tell.
        fields: of requests that inputs were hostile in, at least.
    """

    answers: int
    hostile: int
    gap: float
    health: float
    noticed: dict[str, float]
    ready: float
    growth: float | None
    fields: int = len(FIELDS)


class End(NamedTuple):
    """The server after the load.

    Attributes:
        started: calls of ``COUNTED`` that gRPC's metrics say have begun.
        handled: that they say have ended.
        counted: in ``requests_total``.
        pages: of the KV cache in use, and sequences running and waiting.
        descriptors: open at the start and at the end.
        restarts: in ``engine_restarts_total``.
        exit_code: of the server.
        processes: of it that are left.
        tracebacks: in its log, without grpcio's own of a path that is not UTF-8.
    """

    started: int
    handled: int
    counted: int
    pages: int
    descriptors: tuple[int, int]
    restarts: int
    exit_code: int
    processes: int
    tracebacks: int


class Bound(NamedTuple):
    """One thing that must hold."""

    name: str
    found: str
    wanted: str
    holds: bool


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; NaN, with which no bound holds, of nothing."""
    return float(np.percentile(values, 99)) if values else float("nan")


def growth(series: Sequence[Memory], full: Mapping[int, float] | None = None) -> float | None:
    """How a process grows that has served for long.

    Args:
        series: memory of processes, one after another.
        full: for engines with a KV cache, by process, when each page of it had been written. The first
            write of a page takes memory once and is no growth, so what was seen before does not count.

    Returns:
        MiB per hour in the second half of the longest series of one process; ``None`` if all are short.
    """
    if full is not None:
        series = [one for one in series if one.when >= full.get(one.process, math.inf)]
    series = max((list(one) for _, one in groupby(series, lambda each: each.process)), key=len, default=[])
    late = series[len(series) // 2 :]
    if not late or late[-1].when - late[0].when < _SERIES_SECONDS:
        return None
    slope = statistics.linear_regression([one.when for one in late], [one.bytes for one in late]).slope
    return slope * 3600 / _MIB


def judge(record: Record, limits: Limits, end: End) -> list[Bound]:
    """All bounds, broken ones included."""
    windows = record.windows[1:]
    wrong = [f"{window.fault}: {sentence}" for window in record.windows for sentence in window.wrong]
    hostile = sum((window.hostile for window in windows), Counter())
    real = sum((window.real for window in windows), Counter())
    bugs = sum(hostile[status] for status in _BUGS) + sum(
        count for (_, status), count in real.items() if status in _BUGS
    )
    lost = [window for window in windows if window.fault in limits.noticed]
    grown = {
        "server": growth(record.server),
        "engine": growth(record.engine, record.full),
        **{name: growth(memory) for name, memory in record.encoders.items()},
    }
    bounds = [
        _bound("what should not have been", wrong[:3] or "nothing", "nothing", not wrong),
        _least("real calls answered in a window", [window.answered for window in windows], limits.answers),
        _least("answers compared in a window", [window.compared for window in windows], limits.answers),
        _least("hostile inputs", [hostile.total()], limits.hostile),
        _bound("fields tried", len(record.fields), f"{limits.fields}", len(record.fields) >= limits.fields),
        _most("INTERNAL and UNKNOWN", [bugs], 0),
        _most("strangers let in", [sum(record.strangers[status] for status in _LET_IN)], 0),
        _least("strangers refused", [record.strangers["UNAUTHENTICATED"]], 1),
        _bound("engines started again", end.restarts, f"{len(lost)}", end.restarts == len(lost) > 0),
        *(
            _most(
                f"{fault}: seconds until streams ended",
                [window.found.get("streams ended after") for window in lost if window.fault == fault],
                seconds,
            )
            for fault, seconds in limits.noticed.items()
        ),
        _most(
            "seconds until ready again",
            [window.found.get("ready again after") for window in lost],
            limits.ready,
        ),
        _most("looks at health unanswered", [sum(window.unanswered for window in windows)], 0),
        _most("p99 of gaps in a window, s", [p99(window.gaps) for window in windows], limits.gap),
        _most("p99 of health in a window, s", [p99(window.health) for window in windows], limits.health),
        _bound(
            "calls for the engine started, ended, counted",
            f"{end.started}, {end.handled}, {end.counted}",
            f"equal, at most {record.sent}",
            0 < end.started == end.handled == end.counted <= record.sent,
        ),
        _most("pages and sequences at the end", [end.pages], 0),
        _most("descriptors more than at the start", [end.descriptors[1] - end.descriptors[0]], _DESCRIPTORS),
        _most("tracebacks in the log", [end.tracebacks], 0),
        _most("exit code", [end.exit_code], 0),
        _most("processes left", [end.processes], 0),
    ]
    if limits.growth is not None:
        bounds += [
            _most(f"growth of the {name}, MiB per hour", [value], limits.growth)
            for name, value in grown.items()
        ]
    return bounds


def _bound(name: str, found: object, wanted: str, holds: bool) -> Bound:
    return Bound(name, str(found), wanted, holds)


def _most(name: str, values: Sequence[float | None], limit: float) -> Bound:
    """None is above the limit, and there are some; what was not found, and NaN, are above it."""
    known = [value for value in values if value is not None]
    holds = bool(values) and len(known) == len(values) and all(value <= limit for value in known)
    return Bound(name, f"{max(known):.4g}" if known else "never", f"at most {limit:g}", holds)


def _least(name: str, values: Sequence[int], limit: int) -> Bound:
    return Bound(name, f"{min(values, default=0)}", f"at least {limit}", min(values, default=0) >= limit)
