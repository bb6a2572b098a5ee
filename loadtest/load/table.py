"""Results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from loadtest.columns import Columns, figure
from loadtest.document import cores_of
from loadtest.load.against import Change, Finding, changes, only_in_one
from loadtest.load.device_rows import COLUMNS as DEVICE_COLUMNS
from loadtest.load.device_rows import device_rows, missing_shares
from loadtest.load.remarks import remarks_of
from loadtest.load.result import Result
from loadtest.load.rows import FIGURES, Cell, Row, rows

# Facts that two servers share in a fair comparison.
_SERVED = ("model", "dtype", "kv_dtype", "device")

# Heads that are wider than what stands below them.
_SHORT = {"requests": "reqs"}

_COLORS = {Finding.BETTER: "green", Finding.WORSE: "red"}


def _head(name: str, unit: str) -> str:
    """A column's head in three lines, so that a terminal of 80 columns has room for all."""
    first, _, second = _SHORT.get(name, name).partition(" ")
    return f"{first}\n{second}\n{unit}"


def runs_table(result: Result, *, one_line: bool = False) -> RenderableType:
    """One row per load and target, its repeats together, and below it the remarks.

    Args:
        result: to be shown.
        one_line: intervals stand beside their figures, for what reads a pipe; else below them.
    """
    with_goodput = any(run.summary.goodput is not None for run in result.runs)
    table = _figures(*(["good\n%"] if with_goodput else []), "failed")
    found = rows(result)
    for row in found:
        label = (row.label if one_line else _broken(row.label)) + (" *" if remarks_of(row) else "")
        cells = [shown(row.cells[figure_.key], figure_.factor, one_line) for figure_ in FIGURES]
        if with_goodput:
            cells.append(Text("-" if math.isnan(row.goodput) else f"{100 * row.goodput:.1f}"))
        table.add_row(label, *cells, Text(str(row.failed), style="red" if row.failed else ""))
    notes = [Text(f"* {label}: {remark}") for row in found for label, remark in remarks_of(row)]
    return Group(heading(result), table, *footnotes(found), *notes, *_device_table(found))


def _figures(*more: str) -> Columns:
    """A table of all figures, with more columns behind them."""
    return Columns("load", [*(_head(each.name, each.unit) for each in FIGURES), *more])


def _broken(label: str) -> str:
    """A label in lines, so that a terminal of 80 columns has room for all figures."""
    return label.replace(", ", ",\n")


def shown(cell: Cell, factor: float, one_line: bool = False) -> Text:
    """A figure, and how far its interval reaches to both sides, in percent of it: below it or beside it."""
    interval = cell.interval
    text = Text(figure(interval.value * factor) + ("?" if cell.weak else ""))
    if not interval.claimed or not interval.value:
        return text
    ends = [f"{round(100 * (end / interval.value - 1)):+d}%" for end in (interval.low, interval.high)]
    return text.append(f" {ends[0]}{ends[1]}" if one_line else f"\n{ends[0]}\n{ends[1]}", style="dim")


def footnotes(found: Sequence[Row]) -> list[Text]:
    """The meaning of the signs in the table."""
    cells = [cell for row in found for cell in row.cells.values()]
    claimed = [cell for cell in cells if cell.interval.claimed]
    notes = []
    repeats = max((len(row.runs) for row in found), default=1)
    if any(cell.across_runs for cell in claimed):
        notes.append(f"figures: medians of {repeats} runs; percents: how far their 95% intervals reach")
    elif claimed:
        notes.append(
            "percents: how far the 95% intervals of percentiles reach, within this one run; from run to run "
            "figures differ more (--repeats 6 tells how much)"
        )
    if repeats > 1 and not any(cell.across_runs for cell in claimed):
        notes.append(f"figures: medians of {repeats} runs, too few for intervals; --repeats 6 has them")
    notes += [f"? {weak}" for weak in dict.fromkeys(cell.weak for cell in cells if cell.weak)]
    return [Text(note, style="dim") for note in notes]


def _device_table(found: Sequence[Row]) -> list[RenderableType]:
    """The runs' use of the server's device; nothing where no metrics were read."""
    shown_rows = device_rows(found)
    if not shown_rows:
        return []
    devices = dict.fromkeys(device for row in shown_rows for device in row.devices)
    table = Columns("\n".join(devices), [_head(name, unit) for name, unit, _ in DEVICE_COLUMNS])
    for row in shown_rows:
        table.add_row(row.label, *map(figure, row.figures))
    return [Text(), table, *(Text(note, style="dim") for note in missing_shares(shown_rows))]


def heading(result: Result) -> Text:
    """A description of the measurement, in a few lines."""
    server, machine = result.server, result.machine
    attention = server.get("attention", {})
    names = dict.fromkeys(str(run.workload.get("name")) for run in result.runs)
    served = (
        f"{server.get('model')}, {server.get('dtype')}, KV {server.get('kv_dtype')}, "
        f"attention {attention.get('backend')} ({attention.get('kernel')}), {server.get('device')}; "
    )
    peers = "".join(
        f"{name}: {peer.get('model')} at {peer.get('endpoint')} ({peer.get('api')}, "
        f"tokens {peer.get('tokens')})\n"
        for name, peer in result.peers.items()
    )
    return Text(
        f"{served if server else ''}client on {cores_of(machine)}\n{peers}"
        f"workload {', '.join(names)}, prompt/output tokens; seed {result.seed}"
        + "".join(f"\n{note}" for note in result.notes),
        style="dim",
    )


def comparison(before: Result, after: Result) -> RenderableType:
    """The rows of two results that had the same load: before, after, and after / before."""
    found = changes(before, after)
    table = _figures()
    for label in dict.fromkeys(change.label for change in found):
        own = [change for change in found if change.label == label]
        table.add_row(_broken(label))
        table.add_row("  before", *(figure(each.before.value * each.figure.factor) for each in own))
        table.add_row("  after", *(figure(each.after.value * each.figure.factor) for each in own))
        table.add_row("  ratio", *(_ratio(each) for each in own))
    notes: list[RenderableType] = [Text(note, style="dim") for note in _basis(found)]
    notes += [Text(f"! {line}", style="yellow") for line in differences(before, after)]
    missing = only_in_one(before, after)
    if missing:
        notes.append(Text(f"only in one of the two: {', '.join(missing)}", style="dim"))
    if any(row.label not in missing and remarks_of(row) for row in [*rows(before), *rows(after)]):
        notes.append(Text("! some of these runs have remarks; look at each result by itself", style="yellow"))
    return Group(Text("\nagainst the earlier result", style="bold"), table, *notes)


def _ratio(change: Change) -> Text:
    """After / before: in color where repeats show a difference, in parentheses where not, else with ``~``."""
    if math.isnan(change.ratio.value):
        return Text("-")
    text = f"{change.ratio.value:.2f}"
    if change.finding is Finding.NONE:
        return Text(f"({text})", style="dim")
    color = _COLORS.get(change.finding) if change.across_runs else None
    return Text(f"x{text}", style=color) if color else Text(f"~{text}")


def _basis(found: Sequence[Change]) -> list[str]:
    """The legend of the ratios."""
    notes = []
    if any(change.finding is Finding.NONE for change in found):
        notes.append("in parentheses: no difference shown, the 95% interval of the ratio includes 1")
    if not all(change.across_runs and change.ratio.claimed for change in found):
        notes.append("~: not tested from run to run; --repeats 6, before and after, tests it")
    return notes


def differences(before: Result, after: Result) -> list[str]:
    """Facts in which the two results differ beside their figures; a fair comparison has one line here."""
    found = []
    pairs: Iterable[tuple[str, object, object]] = [
        *(("machine", before.machine.get(key), after.machine.get(key)) for key in ("cpu", "cores")),
        ("workload", _workloads(before), _workloads(after)),
        *((key, before.server.get(key), after.server.get(key)) for key in _SERVED),
        ("endpoints", _peers(before), _peers(after)),
        ("attention", before.server.get("attention"), after.server.get("attention")),
        *((name, before.versions.get(name), version) for name, version in after.versions.items()),
    ]
    for name, one, other in pairs:
        if one != other:
            found.append(f"{name}: {one} before, {other} after")
    return found


def _peers(result: Result) -> str:
    told = (
        f"{name}: {peer.get('model')} at {peer.get('endpoint')}, {peer.get('api')}, tokens "
        f"{peer.get('tokens')}"
        for name, peer in result.peers.items()
    )
    return "; ".join(told) or "none"


def _workloads(result: Result) -> list[str]:
    return sorted({", ".join(f"{key} {value}" for key, value in run.workload.items()) for run in result.runs})
