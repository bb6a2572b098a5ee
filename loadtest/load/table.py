"""Results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.load.device import DeviceUse
from loadtest.load.result import Result, Run

# Header, unit, and where the figure is; larger is better for rates, smaller for times.
_Figure = Callable[[Run], float]
COLUMNS: tuple[tuple[str, str, _Figure, bool], ...] = (
    ("output", "tok/s", lambda run: run.summary.output_rate, True),
    ("prompt", "tok/s", lambda run: run.summary.prompt_rate, True),
    ("requests", "/s", lambda run: run.summary.request_rate, True),
    ("TTFT p50", "ms", lambda run: run.summary.ttft.p50 * 1e3, False),
    ("TTFT p99", "ms", lambda run: run.summary.ttft.p99 * 1e3, False),
    ("TPOT p50", "ms", lambda run: run.summary.tpot.p50 * 1e3, False),
    ("TPOT p99", "ms", lambda run: run.summary.tpot.p99 * 1e3, False),
    ("gap p99", "ms", lambda run: run.summary.chunk_gap.p99 * 1e3, False),
    ("latency p50", "s", lambda run: run.summary.latency.p50, False),
)

DEVICE_COLUMNS: tuple[tuple[str, str, Callable[[DeviceUse], float]], ...] = (
    ("memory used", "GB", lambda use: use.memory_used / 1e9),
    ("memory total", "GB", lambda use: use.memory_total / 1e9),
    ("bandwidth measured", "GB/s", lambda use: use.bandwidth / 1e9),
    ("bandwidth reached", "%", lambda use: use.bandwidth_share * 100),
    ("matrices measured", "GFLOP/s", lambda use: use.matrix_rate / 1e9),
    ("matrices reached", "%", lambda use: use.matrix_share * 100),
)

# What two servers have in common in a fair comparison.
_SERVED = ("model", "dtype", "kv_dtype", "device")

# Smaller changes than this have no color.
_NOISE = 0.02


def _head(name: str, unit: str) -> str:
    """A column's head in three lines, so that a terminal of 80 columns has room for all."""
    first, _, second = name.partition(" ")
    return f"{first}\n{second}\n{unit}"


def figure(value: float) -> str:
    """Three digits that matter."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def runs_table(result: Result) -> RenderableType:
    """One row per run, and below it what is wrong with some."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("load", no_wrap=True)
    for name, unit, _, _ in COLUMNS:
        table.add_column(_head(name, unit), justify="right", no_wrap=True)
    with_goodput = any(run.summary.goodput is not None for run in result.runs)
    if with_goodput:
        table.add_column("good\n%", justify="right")
    table.add_column("failed", justify="right")
    for run in result.runs:
        failed = sum(run.summary.failed.values())
        cells = [run.label + (" *" if remarks(run) else "")]
        cells += [figure(get(run)) for _, _, get, _ in COLUMNS]
        if with_goodput:
            cells.append("-" if run.summary.goodput is None else f"{run.summary.goodput:.1%}"[:-1])
        cells.append(f"[red]{failed}[/red]" if failed else "0")
        table.add_row(*cells)
    notes = [Text(f"* {run.label}: {remark}") for run in result.runs for remark in remarks(run)]
    return Group(heading(result), table, *notes, *_device_table(result))


def _device_table(result: Result) -> list[RenderableType]:
    """What runs made of the server's device; nothing where no metrics were read."""
    uses = [(run.label, run.device) for run in result.runs if run.device is not None]
    if not uses:
        return []
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("\n".join(dict.fromkeys(use.name for _, use in uses)), no_wrap=True)
    for name, unit, _ in DEVICE_COLUMNS:
        table.add_column(_head(name, unit), justify="right", no_wrap=True)
    for label, use in uses:
        table.add_row(label, *(figure(get(use)) for _, _, get in DEVICE_COLUMNS))
    notes = [Text(f"{label}: {sentence}", style="dim") for label, use in uses for sentence in use.unmeasured]
    return [Text(), table, *notes]


def remarks(run: Run) -> list[str]:
    """What a reader must know before believing the figures."""
    failed = ", ".join(f"{count} {code}" for code, count in run.summary.failed.items())
    return [
        *(["INTERRUPTED: it was stopped before its end"] if run.interrupted else []),
        *(f"INVALID: {objection}" for objection in run.objections),
        *([f"failed: {failed}"] if failed else []),
        *(f"client and server disagree: {sentence}" for sentence in run.disagreements),
        *(
            [f"{cached / run.summary.prompt_tokens:.0%} of the prompt tokens came from the prefix cache"]
            if (cached := run.summary.cached_tokens)
            else []
        ),
    ]


def heading(result: Result) -> Text:
    """What was measured, in a line or two."""
    server, machine = result.server, result.machine
    attention = server.get("attention", {})
    names = dict.fromkeys(str(run.workload.get("name")) for run in result.runs)
    return Text(
        f"{server.get('model')}, {server.get('dtype')}, KV {server.get('kv_dtype')}, "
        f"attention {attention.get('backend')} ({attention.get('kernel')}), {server.get('device')}; "
        f"client on {machine.get('cores')} cores of {machine.get('cpu')}\n"
        f"workload {', '.join(names)}, prompt/output tokens; seed {result.seed}",
        style="dim",
    )


def comparison(before: Result, after: Result) -> RenderableType:
    """The runs of two results that had the same load, as ratios after / before."""
    earlier = {run.label: run for run in before.runs}
    shared = [run for run in after.runs if run.label in earlier]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("load", no_wrap=True)
    for name, unit, _, _ in COLUMNS:
        table.add_column(_head(name, unit), justify="right")
    for run in shared:
        cells = [run.label]
        for _, _, get, more_is_better in COLUMNS:
            cells.append(_change(get(earlier[run.label]), get(run), more_is_better))
        table.add_row(*cells)
    notes: list[RenderableType] = [Text("before / after, and after ÷ before", style="dim")]
    notes += [Text(f"! {line}", style="yellow") for line in differences(before, after)]
    missing = _labels(before.runs, after.runs) + _labels(after.runs, before.runs)
    if missing:
        notes.append(Text(f"only in one of the two: {', '.join(missing)}", style="dim"))
    if any(remarks(run) for run in [*shared, *(earlier[run.label] for run in shared)]):
        notes.append(Text("! some of these runs have remarks; look at each result by itself", style="yellow"))
    return Group(table, *notes)


def differences(before: Result, after: Result) -> list[str]:
    """What the two did not have in common beside the figures; a fair comparison has one line here."""
    found = []
    pairs: Iterable[tuple[str, object, object]] = [
        *(("machine", before.machine.get(key), after.machine.get(key)) for key in ("cpu", "cores")),
        ("seed", before.seed, after.seed),
        ("workload", _workloads(before), _workloads(after)),
        *((key, before.server.get(key), after.server.get(key)) for key in _SERVED),
        ("attention", before.server.get("attention"), after.server.get("attention")),
        *((name, before.versions.get(name), version) for name, version in after.versions.items()),
    ]
    for name, one, other in pairs:
        if one != other:
            found.append(f"{name}: {one} before, {other} after")
    return found


def _workloads(result: Result) -> list[str]:
    return sorted({", ".join(f"{key} {value}" for key, value in run.workload.items()) for run in result.runs})


def _labels(runs: Sequence[Run], others: Sequence[Run]) -> list[str]:
    known = {run.label for run in others}
    return [run.label for run in runs if run.label not in known]


def _change(before: float, after: float, more_is_better: bool) -> str:
    if math.isnan(before) or math.isnan(after) or not before:
        return f"{figure(before)}\n{figure(after)}"
    ratio = after / before
    better = ratio > 1 if more_is_better else ratio < 1
    color = "green" if better else "red"
    mark = f"x {ratio:.2f}"
    if abs(ratio - 1) >= _NOISE:
        mark = f"[{color}]{mark}[/{color}]"
    return f"{figure(before)}\n{figure(after)}\n{mark}"
