"""KV memory of one sequence against its length."""

from __future__ import annotations

import math

from loadtest.compare.types import Comparison
from loadtest.measuring.types import length_label
from loadtest.report import view
from loadtest.report.chart import Chart
from loadtest.report.drawing import Drawing, drawing
from loadtest.report.look import look
from loadtest.report.scale import Axis, span
from loadtest.report.svg import HALF, NARROW, Size

_NAMES = 175.0


def memory_against_length(comparison: Comparison) -> Drawing | None:
    """One line per candidate; ``None`` before anything is known."""
    found = {
        name: sorted(
            (memory.length, memory.bytes / 2**20)
            for memory in comparison.memory
            if memory.deployment == name and math.isfinite(memory.bytes)
        )
        for name in view.numbers(comparison)
    }
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None

    def draw(size: Size) -> Chart:
        lengths = sorted({length for points in found.values() for length, _ in points})
        log = lengths[-1] / lengths[0] >= 8
        low, high = span(lengths, log=log, pad=0.03)
        top = span([value for points in found.values() for _, value in points], include=(0.0,))[1]
        x = Axis(
            "tokens of the sequence", low, high, log, tuple(lengths), lambda tick: length_label(int(tick))
        )
        chart = Chart(size, x, Axis("MiB", 0.0, top), right=12 if size.narrow else _NAMES)
        numbers = view.numbers(comparison)
        for name, points in found.items():
            chart.line(points, look(numbers[name]))
            for length, value in points:
                note = f"{name}: {value:.1f} MiB at {length_label(length)}"
                chart.point(length, value, look(numbers[name]), note)
        if size.narrow:
            chart.names_below([(name, look(numbers[name])) for name in found])
        else:
            chart.names_beside([(points[-1][1], name, look(numbers[name])) for name, points in found.items()])
        return chart

    caption = "What one sequence holds of the KV cache while it is continued. Lower is better."
    return drawing("memory-length", "KV memory against length", caption, draw, sizes=(HALF, NARROW))
