"""When there is enough evidence to stop measuring."""

import math
from dataclasses import replace

import numpy as np
import pytest

from loadtest.compare.judge import judge
from loadtest.compare.plan import Asked, PlanError, make_plan
from loadtest.compare.stopping import LEAST_CONFIDENCE, is_firm, open_tests, speeds_settled, widening
from loadtest.compare.types import Evidence, Outcome
from loadtest.measuring.student import student_quantile
from loadtest.measuring.types import Interval
from tests.loadtest.synthetic import EQUAL, FEW, FULL, WINDOW, draw


def test_measuring_goes_on_until_a_verdict_is_firm():
    loss = Interval(0.0, -0.04, 0.04, 100)
    test = Evidence("x", "task:vt", 4, "score", loss, 0.05, 1, 1, Outcome.SAFE, None)
    assert not is_firm(test), "within the margin, but not by much"
    assert is_firm(replace(test, margin=0.07))
    beyond = replace(test, outcome=Outcome.UNSAFE, loss=Interval(0.2, 0.12, 0.28, 100))
    assert is_firm(beyond)
    assert not is_firm(replace(beyond, margin=0.09))
    assert widening(0.95, 10_000) == pytest.approx(3.29 / 1.96, abs=1e-2), "Haybittle and Peto: p < 0.001"
    assert widening(0.95, 5) > widening(0.95, 50), "and more of few contexts"
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


@pytest.mark.parametrize("confidence", [LEAST_CONFIDENCE, 0.8, 0.95, 0.98])
def test_a_run_that_looks_after_each_sample_errs_hardly_oftener_than_one_look(confidence):
    """The loss is the margin itself: each verdict is an error. With 0.7 errors wider it was 0.82 at 0.5."""
    runs, first, last = 4000, 6, 120
    samples = np.random.default_rng(2).normal(size=(runs, last))
    number = np.arange(1, last + 1)
    sums, squares = samples.cumsum(axis=1), (samples**2).cumsum(axis=1)
    variance = (squares - sums**2 / number) / np.maximum(number - 1, 1)
    away = np.abs(sums / number) / np.sqrt(np.maximum(variance, 1e-30) / number)
    nominal = np.array([student_quantile((1 - confidence) / 2, max(n - 1, 1)) for n in number])
    firm = nominal * [widening(confidence, max(n - 1, 1)) for n in number]
    stopped = (away > firm)[:, first - 1 :].any(axis=1)
    erred = float(np.mean(stopped | (away[:, -1] > nominal[-1])))
    assert erred <= 1.4 * (1 - confidence)


@pytest.mark.parametrize("confidence", [0.4, 0.9995, 1.0, -1.0, math.nan])
def test_a_confidence_for_which_the_rule_was_not_tried_is_refused(confidence):
    with pytest.raises(PlanError, match=r"give 0\.5 to 0\.999"):
        make_plan(Asked(confidence=confidence))


def test_new_prompts_of_one_user_are_settled_by_the_time_to_the_first_token():
    """Time per token is told by the prompts in the cache; that of new ones may be as noisy as it likes."""
    drawn = draw(1, replace(FEW, candidates=(FULL, WINDOW), rounds=6, noise=0.001))
    cached, new = drawn.plan.loads
    drawn.speed = [
        replace(cell, figures={**cell.figures, "tpot": cell.figures["tpot"] * (1 + cell.round)})
        if cell.deployment == WINDOW.name
        else cell
        for cell in drawn.speed
    ]
    names = [FULL.name, WINDOW.name]
    assert speeds_settled(drawn, new, names)
    assert not speeds_settled(drawn, cached, names)
    alone = replace(drawn, plan=replace(drawn.plan, loads=(new,)))
    assert not speeds_settled(alone, new, names), "where no other load tells it, it is this one's to tell"
    late = [cell for cell in drawn.speed if cell.deployment == FULL.name or cell.round > 0]
    assert not speeds_settled(replace(drawn, speed=late), new, names), "each takes its rounds"
