"""The work that the quick form of a comparison gets done in its five minutes, by a simulated clock."""

import pytest

from loadtest.compare.presets import QUICK
from loadtest.compare.types import Outcome
from tests.loadtest.synthetic import LONG, TOPK, Sizes, Truth
from tests.loadtest.test_compare_loop import World

SIZES = Sizes(blocks=80, contexts=20, turns=12, tokens=4, tasks=QUICK.tasks, rounds=0, lengths=QUICK.contexts)
START = 20.0
PREFILL = {1024: 0.8, LONG: 3.0}
CACHED, QUESTIONS, BLOCKS, WATCH = 1.5, 1.8, 2.0, 0.5


def visit(load):
    return CACHED if load.cached else PREFILL[load.context]


def turn(unit):
    if unit.kind == "memory":
        return WATCH
    return PREFILL[unit.length] + (QUESTIONS if unit.kind == "answers" else BLOCKS)


@pytest.mark.parametrize("seed", range(4))
def test_five_minutes_on_two_cores_find_a_large_loss(monkeypatch, seed):
    """Six contexts at 4k for quality, and six rounds of each load on which advice depends.

    There are 280 s beside the start, and a round of a load is six visits. Six of both cached loads take
    36 * (1.5 + 1.5) = 108 s; a unit of each kind at both lengths 3 * (2.6 + 4.8 + 2.8 + 5 + 2 * 0.5) = 49 s;
    five more contexts at 4k 5 * 3 * 4.8 = 72 s: 229 s together. Six rounds with new prompts would take
    36 * (0.8 + 3) = 137 s more, which do not fit: these get what is left, and their figures stay unclaimed.
    """
    truths = {"window": Truth(lost=0.6), "topk": Truth(lost=0.45)}
    world = World(monkeypatch, {TOPK.name: 1.3}, 0.03, sizes=SIZES, seed=seed, **truths)
    world.visit_seconds, world.turn_seconds = visit, turn
    comparison, judgments = world.compare(QUICK.seconds - START)
    assert world.now <= QUICK.seconds - START
    for name in {one.name for one in comparison.plan.candidates}:
        rows = [row for row in comparison.answers if (row.deployment, row.length) == (name, LONG)]
        assert len({row.index for row in rows}) >= 6
        for load in comparison.plan.loads:
            cells = [cell for cell in comparison.speed if (cell.deployment, cell.load) == (name, load.label)]
            assert len({cell.round for cell in cells}) >= (6 if load.cached else 1)
    assert [verdict.outcome for verdict in judgments[-1].verdicts] == [Outcome.UNSAFE] * 2
