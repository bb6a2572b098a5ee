"""The chances of losses, and Holm's correction for many of them."""

from dataclasses import replace

import pytest

from loadtest.compare.holm import holm, p_worse
from loadtest.compare.types import Evidence, Outcome
from loadtest.measuring.student import student_quantile, student_tail
from loadtest.measuring.types import Interval


def test_holm_keeps_the_chance_of_one_wrong_rejection():
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([0.02], 0.025) == [True]
    assert holm([], 0.05) == []
    for freedom, quantile in ((1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042)):  # of any table
        assert student_quantile(0.025, freedom) == pytest.approx(quantile, abs=1e-3)
        assert student_tail(-quantile, freedom) == pytest.approx(0.975, abs=1e-4)


def test_the_chance_of_a_loss_is_that_of_its_interval():
    loss = Interval(0.12, 0.05, 0.19, 40)
    test = Evidence("x", "tasks", 1, "score", loss, 0.05, 1.0, 0.9, Outcome.UNKNOWN, contexts=10)
    assert p_worse(test, 0.95) == pytest.approx(0.025)
    assert p_worse(replace(test, margin=0.12), 0.95) == 1.0
    assert p_worse(replace(test, margin=0.0), 0.95) < 0.01
    assert p_worse(replace(test, loss=Interval(0.5, count=3)), 0.95) == 1.0
