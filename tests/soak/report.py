"""A run as JSON, and as a table for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tests.soak.bounds import p99
from tests.soak.inputs import FIELDS
from tests.soak.record import Window
from tests.soak.run import Plan, Result


def document(plan: Plan, result: Result) -> dict[str, Any]:
    """Everything as JSON has it."""
    record = result.record
    return {
        "plan": {**dataclasses.asdict(plan), "server": list(map(str, plan.server))},
        "windows": [_window(window) for window in record.windows[1:]],
        "hostile": {"kinds": record.kinds, "fields": sorted(record.fields), "strangers": record.strangers},
        "memory": {
            name: [(round(each.when, 1), each.process, each.bytes) for each in series]
            for name, series in {
                "server": record.server,
                "engine": record.engine,
                **record.encoders,
            }.items()
        },
        "full": {process: round(when, 1) for process, when in record.full.items()},
        "end": result.end._asdict(),
        "bounds": [bound._asdict() for bound in result.bounds],
    }


def _window(window: Window) -> dict[str, Any]:
    return {
        "fault": window.fault,
        "real": {f"{kind}, {status}": count for (kind, status), count in sorted(window.real.items())},
        "tokens": window.tokens,
        "compared": window.compared,
        "gaps_p99": p99(window.gaps),
        "health_p99": p99(window.health),
        "unanswered": window.unanswered,
        "hostile": window.hostile,
        "found": window.found,
        "wrong": window.wrong,
    }


def table(plan: Plan, result: Result) -> str:
    """The figures that README has, in Markdown."""
    record = result.record
    windows = record.windows[1:]
    real = sum((window.real for window in windows), Counter())
    statuses: Counter[str] = Counter()
    for (_, status), count in real.items():
        statuses[status] += count
    hostile = sum((window.hostile for window in windows), Counter())
    rows = [
        (
            "load",
            f"{real.total():,} calls in {plan.seconds / 60:g} minutes, {_sum(windows, 'tokens'):,} tokens",
        ),
        ("calls by status", _counts(statuses)),
        ("compared with the unloaded server", f"{_sum(windows, 'compared'):,} answers"),
        *((f"fault: {fault}", _fault(windows, fault)) for fault in sorted({each.fault for each in windows})),
        (
            "hostile inputs",
            f"{hostile.total():,}: {_counts(record.kinds)}; {len(record.fields)} of {len(FIELDS)} fields",
        ),
        ("inputs by status", _counts(hostile)),
        ("without a token", _counts(record.strangers)),
    ]
    rows += [
        (bound.name, bound.found + ("" if bound.holds else f" (**not {bound.wanted}**)"))
        for bound in result.bounds
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _sum(windows: Iterable[Window], name: str) -> int:
    return sum(getattr(window, name) for window in windows)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


def _fault(windows: Sequence[Window], fault: str) -> str:
    ones = [window for window in windows if window.fault == fault]
    found = {name: [window.found[name] for window in ones if name in window.found] for name in ones[0].found}
    parts = [f"{len(ones)} times", *(f"{name} {_range(values)}" for name, values in found.items())]
    gaps, health = (np.median([p99(getattr(one, name)) for one in ones]) for name in ("gaps", "health"))
    return f"{'; '.join(parts)}; p99 of gaps {1000 * gaps:.0f} ms, of health {1000 * health:.0f} ms"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    shown = [f"{value:.2f}" if isinstance(value, float) else f"{value}" for value in (low, high)]
    return shown[0] if shown[0] == shown[1] else " to ".join(shown)
