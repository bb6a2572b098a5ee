"""Hostile messages that clients repeat hold up no other client, and each bound of that can fail."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from tests.e2e.isolation import NOTHING, Row, judge, run, table

QUIET = Row(NOTHING, None, {}, 0.01, 0.02, 0.001, 0.002, 0.01, 0)
WORK = replace(QUIET, name="work", answers={"OK": 4}, gap=0.08)
GOOD = replace(QUIET, name="a text", against=NOTHING, answers={"INVALID_ARGUMENT": 8}, gap=0.03)
COMPUTED = replace(WORK, name="more work", against="work", gap=0.24)


def broken(*rows: Row) -> list[str]:
    return [bound.name for bound in judge(rows) if not bound.holds]


def test_each_bound_can_fail():
    assert broken(QUIET, GOOD, WORK, COMPUTED) == []
    for change, name in (
        ({"gap": 0.031}, "gaps"),
        ({"gap": float("nan")}, "gaps"),
        ({"health_worst": 0.051}, "health"),
        ({"metrics_worst": 0.051}, "metrics"),
        ({"grown": (300 << 20) + 1}, "memory"),
        ({"answers": {}}, "answers"),
        ({"answers": {"INVALID_ARGUMENT": 8, "UNAVAILABLE": 1}}, "answers"),
    ):
        assert broken(QUIET, replace(GOOD, **change)) == [f"a text: {name}"]
    assert broken(QUIET, WORK, replace(COMPUTED, gap=0.241)) == ["more work: gaps"]
    assert broken(replace(QUIET, health_worst=1.0)) == [f"{NOTHING}: health"]


def test_the_table_fits_a_line():
    name = "a name of some forty letters, as they are"
    text = io.StringIO()
    Console(file=text, width=80).print(table([QUIET, replace(GOOD, name=name, grown=299 << 20)]))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("grown" in line for line in lines) == 1, "one part"
    assert any("forty" in line and " 3.0 " in line for line in lines)


@pytest.mark.stress
@pytest.mark.timeout(400)
def test_hostile_messages_hold_up_nobody():
    bounds = judge(run(5.0, []))
    assert [bound for bound in bounds if not bound.holds] == []
