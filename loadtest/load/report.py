"""A result as one HTML file that needs nothing else: figures, plots, and what to know about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.html import page, plot, text
from loadtest.load.result import Result, Run
from loadtest.load.table import COLUMNS, DEVICE_COLUMNS, figure, heading, remarks

_BLUE, _ORANGE = "#1f6fb4", "#d9822b"
_SHARES = [0.5, 0.9, 0.95, 0.99]


def write_report(result: Result, path: Path) -> None:
    """Writes the report of a result with at least one run."""
    lines = text(heading(result).plain).replace("\n", "<br>")
    body = [
        f"<p class='dim'>{lines}<br>{text(result.created)}</p>",
        _table(result),
        *_remarks(result),
        *_device(result),
        *_plots(result),
        _facts(result),
    ]
    path.write_text(page(f"Load test of {result.server.get('model')}", body), encoding="utf-8")


def _table(result: Result) -> str:
    goodput = any(run.summary.goodput is not None for run in result.runs)
    heads = [f"{name}<br><small>{unit}</small>" for name, unit, _, _ in COLUMNS]
    heads += (["good"] if goodput else []) + ["failed", "requests"]
    rows = []
    for run in result.runs:
        cells = [figure(get(run)) for _, _, get, _ in COLUMNS]
        if goodput:
            cells.append("-" if run.summary.goodput is None else f"{run.summary.goodput:.1%}")
        cells += [str(sum(run.summary.failed.values())), str(run.summary.requests)]
        mark = " class='bad'" if run.objections or run.interrupted else ""
        rows.append(
            f"<tr{mark}><th>{text(run.label)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    head = "".join(f"<th>{cell}</th>" for cell in ["load", *heads])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _remarks(result: Result) -> list[str]:
    notes = [
        f"<li><b>{text(run.label)}</b>: {text(note)}</li>" for run in result.runs for note in remarks(run)
    ]
    if not notes:
        return ["<p>Every run is valid, nothing failed, and the client's totals equal the server's.</p>"]
    return ["<h2>To know before believing the figures</h2><ul>", *notes, "</ul>"]


def _device(result: Result) -> list[str]:
    uses = [(run.label, run.device) for run in result.runs if run.device is not None]
    if not uses:
        return []
    heads = "".join(f"<th>{name}<br><small>{unit}</small></th>" for name, unit, _ in DEVICE_COLUMNS)
    rows = [
        f"<tr><th>{text(label)}</th>"
        + "".join(f"<td>{figure(get(use))}</td>" for _, _, get in DEVICE_COLUMNS)
        + "</tr>"
        for label, use in uses
    ]
    notes = [f"<li><b>{text(label)}</b>: {text(note)}</li>" for label, use in uses for note in use.unmeasured]
    return [
        f"<h2>Device: {text(', '.join(dict.fromkeys(use.name for _, use in uses)))}</h2>",
        f"<table><thead><tr><th>load</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>",
        *(["<ul>", *notes, "</ul>"] if notes else []),
    ]


def _plots(result: Result) -> list[str]:
    closed = [run for run in result.runs if run.load["kind"] == "closed"]
    parts = []
    if len(result.runs) > 1:
        parts.append(
            plot(
                "Throughput against latency",
                lambda axes: _throughput(axes, result.runs),
                "one point per load",
            )
        )
    if len(closed) > 2:
        parts.append(plot("Users", lambda axes: _users(axes, closed), "throughput as users are added"))
    parts.append(plot("Time to first token", lambda axes: _percentiles(axes, result.runs, "ttft"), _BARS))
    parts.append(plot("Between messages", lambda axes: _percentiles(axes, result.runs, "chunk_gap"), _BARS))
    return parts + [_over_time(run) for run in result.runs if run.requests]


def _over_time(run: Run) -> str:
    caption = "waiting for the first token, and receiving tokens, as the client saw it"
    return plot(f"Requests over time, {run.label}", lambda axes: _timeline(axes, run), caption)


_BARS = "percentiles 50, 90, 95 and 99, lightest to darkest"


def _throughput(axes: Any, runs: Sequence[Run]) -> None:
    for kind, color in (("closed", _BLUE), ("open", _ORANGE)):
        chosen = [run for run in runs if run.load["kind"] == kind]
        if not chosen:
            continue
        x = [run.summary.output_rate for run in chosen]
        y = [run.summary.latency.p50 for run in chosen]
        axes.plot(x, y, "o-", color=color, label=f"{kind} loop")
        for run, at_x, at_y in zip(chosen, x, y, strict=True):
            axes.annotate(run.load_label, (at_x, at_y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel="output tokens per second", ylabel="median latency, s")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)


def _users(axes: Any, runs: Sequence[Run]) -> None:
    users = [run.load["concurrency"] for run in runs]
    axes.plot(users, [run.summary.output_rate for run in runs], "o-", color=_BLUE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(users, [str(count) for count in users])
    axes.set(xlabel="users", ylabel="output tokens per second")
    axes.set_ylim(bottom=0)


def _percentiles(axes: Any, runs: Sequence[Run], name: str) -> None:
    width = 0.8 / len(_SHARES)
    for index, share in enumerate(_SHARES):
        heights = [getattr(getattr(run.summary, name), f"p{round(share * 100)}") * 1e3 for run in runs]
        heights = [0 if math.isnan(height) else height for height in heights]
        places = [place + (index - 1.5) * width for place in range(len(runs))]
        axes.bar(places, heights, width * 0.95, color=_BLUE, alpha=0.3 + 0.7 * index / (len(_SHARES) - 1))
    axes.set_xticks(range(len(runs)), [run.label for run in runs], rotation=30 if len(runs) > 6 else 0)
    axes.set(ylabel="milliseconds")


def _timeline(axes: Any, run: Run) -> None:
    waiting = _steps((r["sent"], r["ended"] if r["first"] is None else r["first"]) for r in run.requests)
    running = _steps((r["first"], r["ended"]) for r in run.requests if r["first"] is not None)
    for (times, counts), color, label in ((running, _BLUE, "receiving"), (waiting, _ORANGE, "waiting")):
        axes.step(times, counts, where="post", color=color, label=label)
        axes.fill_between(times, counts, step="post", color=color, alpha=0.15)
    axes.set(xlabel="seconds", ylabel="requests")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _steps(spans: Any) -> tuple[list[float], list[int]]:
    """How many of the spans are open at each time at which one begins or ends."""
    events = sorted(event for begin, end in spans for event in ((begin, 1), (end, -1)))
    times, counts = [0.0], [0]
    for when, change in events:
        times.append(when)
        counts.append(counts[-1] + change)
    return times, counts


def _facts(result: Result) -> str:
    settings = result.server.get("settings", {})
    rows = {
        "client": ", ".join(f"{key} {value}" for key, value in result.machine.items()),
        "versions": ", ".join(f"{key} {value}" for key, value in result.versions.items()),
        "attention": ", ".join(f"{key} {value}" for key, value in result.server.get("attention", {}).items()),
        "server's settings": ", ".join(f"{key}={value}" for key, value in sorted(settings.items())),
    }
    cells = "".join(f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in rows.items())
    return f"<h2>What ran</h2><table class='facts'>{cells}</table>"
