"""A comparison with plain figures, and how the terminal shows one."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from loadtest.compare.judge import judge
from loadtest.compare.table import table
from loadtest.evaluation.types import Memory
from tests.loadtest.synthetic import FULL, LONG, TOPK, WINDOW, Sizes, Truth, draw

SIZES = Sizes(blocks=24, tokens=4, contexts=16, turns=11, rounds=8, noise=0.0)
FAR = (0.0, 0.1, 0.2, 0.3)


def plain(comparison, speeds, **nats):
    """Without chance: each token loses ``nats``, and decoding takes 1% more or less from round to round."""
    full = {(row.length, row.block): row.logprobs for row in comparison.text if row.deployment == FULL.name}
    nats = {FULL.name: 0.0, TOPK.name: nats["topk"], **nats}
    comparison.text = [
        replace(row, logprobs=tuple(value - nats[row.deployment] for value in full[row.length, row.block]))
        for row in comparison.text
    ]
    cells = []
    for cell in comparison.speed:
        speed = speeds.get(cell.deployment, 1.0)
        tpot = 0.005 / speed * (1 + 0.01 * (cell.round % 3 - 1) * (speed != 1))
        cells.append(replace(cell, figures={**cell.figures, "tpot": tpot, "output_rate": 1 / tpot}))
    comparison.speed = cells
    return comparison


def usual():
    """Top-k is safe, faster and larger; the window is faster still and finds nothing far away."""
    drawn = draw(1, SIZES, window=Truth(lost=1.0, depths=FAR))
    held = {FULL.name: (32, 32), WINDOW.name: (32, 8), TOPK.name: (34, 34)}
    drawn.memory = [
        Memory(name, length, size * length / LONG * 2**20, int(2**30 / (size * length / LONG * 2**20)))
        for name, sizes in held.items()
        for length, size in zip((1024, LONG), sizes, strict=True)
    ]
    full = {_question(row): row.score for row in drawn.answers if row.deployment == FULL.name}
    drawn.answers = [
        replace(row, score=full[_question(row)]) if row.length == 1024 else row for row in drawn.answers
    ]
    return plain(drawn, {TOPK.name: 1.25, WINDOW.name: 2.0}, topk=0.01, **{WINDOW.name: 0.02})


def _question(row):
    return row.task, row.length, row.index, row.turn


def text(comparison, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(comparison, judge(comparison)))
    return console.export_text()
