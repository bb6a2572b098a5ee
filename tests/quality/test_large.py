"""The tests that take minutes, for ``make stress``; ``make quality`` runs them too and prints figures."""

import pytest

from loadtest import texts
from loadtest.quality.__main__ import TESTS
from loadtest.quality.measurement import run

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("test", [2, 4, 6])
def test_a_large_one(test):
    outcomes = run([TESTS[test](texts.prose(texts.reference()))], [], lambda name: None)
    for outcome in outcomes:
        print(f"{outcome.what}: {outcome.measured}; expected: {outcome.expected}")
    assert [outcome for outcome in outcomes if not outcome.passed] == []
