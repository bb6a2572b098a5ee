"""Rounds that are set aside and measured again, over a machine that is simulated."""

import math
import random
from dataclasses import replace
from statistics import fmean, stdev

import pytest

from loadtest.measuring.again import MOST_AGAIN, Again, levels
from loadtest.measuring.analysis import ratio, series
from loadtest.measuring.busy import EqualPair, alarms, sentence, set_aside
from loadtest.measuring.rounds import Rounds
from loadtest.measuring.statistics import LEAST
from tests.loadtest.simulated import SHORT, Machine, Simulated

PAIRS = [EqualPair("a", "b", SHORT.label)]
TRUE = {"a": 1.0, "b": 1.0, "c": 1 / 1.15}


def measure(machine, slow, rounds=8, repeating=True, names="abc"):
    """As many rounds that count, of ``a``, ``b`` that equals it, and ``c`` that is 1.15 times as fast."""
    targets = {name: Simulated(machine, TRUE[name], 10 + place) for place, name in enumerate(names)}
    for name, factor in slow.items():
        targets[name].slow = factor
    made = Rounds(targets, [SHORT], clock=machine.clock, observe=machine.observe)
    again = Again(made.measurements)
    while again.counted(SHORT.label) < rounds:
        made.step(SHORT)
        if repeating:
            any(again.answer(alarm, names) for alarm in alarms(made.measurements, PAIRS))
    return made.measurements


def said(made):
    return sentence(alarms(made, PAIRS), made)


def between(begin, end, factor):
    return lambda now: factor if begin <= now < end else 1.0


def test_rounds_of_a_slow_stretch_are_set_aside_for_all_alike_and_measured_again():
    slow = dict.fromkeys("abc", between(100, 145, 3.0))  # of three rounds
    alone = measure(Machine(), slow, repeating=False)
    assert "changed by a factor of" in said(alone)
    made = measure(Machine(), slow)
    assert said(made) == ""
    assert set_aside(made, SHORT.label).keys() == {0, 1, 2}
    assert "from round to round" in made[0].set_aside
    assert {each.deployment for each in made if each.round == 0} == set("abc")
    assert len(series(made, "a", SHORT.label, "tpot")) == 8
    assert 2 not in series(made, "c", SHORT.label, "tpot")
    assert ratio(made, "c", "a", SHORT.label, "tpot").value == pytest.approx(1.15, rel=0.03)


@pytest.mark.parametrize(
    ("end", "why"),
    [(150, "time per output token differs by a factor of 1.5"), (118, "changed by a factor of 1.5")],
    ids=["in all rounds", "in three of six"],
)
def test_where_equal_work_differs_all_rounds_of_the_load_are_measured_anew(end, why):
    made = measure(Machine(), {"b": between(100, end, 1.5)})
    assert said(made) == ""
    aside = set_aside(made, SHORT.label)
    assert list(aside) == list(range(len(aside)))
    assert len(aside) >= LEAST
    assert "a and b read the same" in aside[0]
    assert why in aside[0]
    assert ratio(made, "b", "a", SHORT.label, "tpot").value == pytest.approx(1.0, abs=0.05)


def test_repeats_that_do_not_help_end_after_two_times_and_are_told():
    made = measure(Machine(), {"b": lambda now: 1.5})
    assert len(set_aside(made, SHORT.label)) == MOST_AGAIN * LEAST
    words = said(made)
    assert "a and b read the same at" in words
    assert f"although {MOST_AGAIN * LEAST} rounds of it had been measured again" in words


def test_rounds_are_not_set_aside_where_a_server_has_ended():
    made = measure(Machine(), {"b": lambda now: 1.5}, rounds=LEAST, repeating=False)
    (alarm,) = alarms(made, PAIRS)
    again = Again(made)
    assert alarm.deployments == ("a", "b")
    assert not again.answer(alarm, ["a", "b"]), "nothing could take the place of c's rounds"
    assert not again.answer(alarm, ["a", "c"]), "rounds without b would tell nothing of it"
    assert again.answer(alarm, list("abc"))
    assert again.due(SHORT.label)
    assert Again(made).due(SHORT.label), "a run that goes on with these rows knows it too"
    assert "6 rounds of 1k, 1 user, cached prompts did not count (a and b read the same" in said(made)


def test_a_level_is_the_same_for_any_order_of_deployments():
    slow = {"a": between(100, 110, 2.0), "c": between(120, 140, 1.7)}
    made = measure(Machine(), slow, repeating=False)
    names = {"a": "c", "b": "a", "c": "b"}
    renamed = [replace(each, deployment=names[each.deployment]) for each in made]
    assert levels(renamed, SHORT.label, "tpot") == levels(made, SHORT.label, "tpot")


def spikes(random_, machine):
    machine.spikes = {visit: 2.0 for visit in range(400) if random_.random() < 0.3}
    return {}


def stretch(random_, machine):
    begin = 100 + 20 * random_.random()
    return dict.fromkeys("abc", between(begin, begin + 5 + 30 * random_.random(), 1.5 + 2 * random_.random()))


@pytest.mark.parametrize("weather", [spikes, stretch])
def test_setting_rounds_aside_makes_no_differences_and_favors_none(weather):
    """Over many machines that are disturbed by chance: more is told, and nothing is biased."""
    told = {True: 0, False: 0}
    false, errors, repeated = 0, [], 0
    for seed in range(60):
        for repeating in (False, True):
            machine = Machine(seed=seed)
            made = measure(machine, weather(random.Random(seed), machine), repeating=repeating)
            if said(made):
                continue
            told[repeating] += 1
            if repeating:
                repeated += bool(set_aside(made, SHORT.label))
                false += ratio(made, "b", "a", SHORT.label, "tpot").excludes(1.0)
                errors.append(math.log(ratio(made, "c", "a", SHORT.label, "tpot").value / 1.15))
    assert repeated >= 10
    assert told[True] > told[False]
    assert false <= 6  # 5% of 60 is 3; more than 6 would happen once in 30 times
    assert abs(fmean(errors)) < 2.5 * stdev(errors) / math.sqrt(len(errors))
