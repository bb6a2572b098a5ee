"""When there is enough evidence to stop measuring."""

from dataclasses import replace

import pytest

from loadtest.compare.judge import judge
from loadtest.compare.stopping import is_firm, open_tests, speeds_settled, widening
from loadtest.compare.types import Evidence, Outcome
from loadtest.measuring.types import Interval
from tests.loadtest.synthetic import EQUAL, FEW, FULL, WINDOW, draw


def test_measuring_goes_on_until_a_verdict_is_firm():
    loss = Interval(0.0, -0.04, 0.04, 100)
    test = Evidence("x", "task:vt", 4, "score", loss, 0.05, 1, 1, Outcome.SAFE, None)
    assert not is_firm(test), "within the margin, but not by much"
    assert is_firm(replace(test, margin=0.055))
    beyond = replace(test, outcome=Outcome.UNSAFE, loss=Interval(0.2, 0.1, 0.3, 100))
    assert is_firm(beyond)
    assert not is_firm(replace(beyond, margin=0.09))
    assert widening(0.95) == pytest.approx(1.357, abs=1e-3)
    narrow = replace(beyond, margin=0.02)
    assert is_firm(narrow)
    assert not is_firm(narrow, 0.5), "an interval of half the cases is narrow, and so much wider it must be"
    text = replace(test, measure="text", outcome=Outcome.UNKNOWN, more=7)
    verdict = judge(draw(1, FEW)).verdicts[0]
    assert open_tests(replace(verdict, evidence=(test, text))) == {("tasks", 4), ("text", 4)}
    assert open_tests(replace(verdict, evidence=(replace(test, decides=False), text))) == {("text", 4)}
    assert not open_tests(replace(verdict, evidence=(beyond, text))), "one firm loss is enough"
    assert not open_tests(replace(verdict, evidence=(replace(text, more=None),))), "nothing would settle it"


def test_variants_that_all_do_equal_work_get_rounds_too():
    sizes = replace(FEW, lengths=(512, 1024), candidates=(FULL, WINDOW), rounds=6)
    drawn = draw(1, sizes, window=EQUAL)
    short, long = drawn.plan.loads[0], drawn.plan.loads[2]
    names = [FULL.name, WINDOW.name]
    assert speeds_settled(drawn, long, names), "what is equal need not be told apart"
    drawn.speed = [cell for cell in drawn.speed if cell.load != long.label]
    assert speeds_settled(drawn, short, names)
    assert not speeds_settled(drawn, long, names), "full attention would have no figure there"
    few = replace(drawn, speed=[cell for cell in drawn.speed if cell.round < 5])
    assert not speeds_settled(few, short, names), "nor any interval"
