"""The judgment of quality, on comparisons with known truth."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from loadtest.compare.evidence import EQUAL as EQUAL_NOTE
from loadtest.compare.evidence import is_whole
from loadtest.compare.ground import Ground, frequency_perplexity
from loadtest.compare.judge import decide, judge
from loadtest.compare.stopping import open_tests
from loadtest.compare.types import Evidence, Outcome
from loadtest.measuring.types import Interval
from tests.loadtest.synthetic import (
    EQUAL,
    FEW,
    FULL,
    LONG,
    MANY,
    TOPK,
    WINDOW,
    Sizes,
    Truth,
    draw,
)

RUNS = 200
# Fewer seeds in `make test`, all of them in `make stress`.
many_runs = pytest.mark.parametrize("runs", [80, pytest.param(RUNS, marks=pytest.mark.stress)])


def outcomes(sizes, truth, runs=RUNS):
    return Counter(judge(draw(seed, sizes, topk=truth)).verdicts[0].outcome for seed in range(runs))


@many_runs
def test_a_variant_without_loss_is_hardly_ever_called_unsafe(runs):
    assert outcomes(FEW, EQUAL, runs)[Outcome.UNSAFE] <= 0.05 * runs


def test_a_variant_without_loss_is_found_safe_by_many_samples():
    found = outcomes(MANY, EQUAL, 20)
    assert found[Outcome.SAFE] >= 0.6 * 20
    assert not found[Outcome.UNSAFE]
    assert outcomes(MANY, Truth(), 10) == {Outcome.SAFE: 10}


@many_runs
@pytest.mark.parametrize("worse", [Truth(nats=math.log(1.1)), Truth(lost=0.1 / 0.85)], ids=["text", "tasks"])
def test_a_loss_of_twice_the_margin_is_hardly_ever_called_safe(worse, runs):
    assert outcomes(FEW, worse, runs)[Outcome.SAFE] <= 0.05 * runs


@pytest.mark.parametrize("worse", [Truth(nats=math.log(1.1)), Truth(lost=0.5 / 0.85)], ids=["text", "tasks"])
def test_a_large_loss_is_found_from_few_samples(worse):
    assert outcomes(FEW, worse, 20)[Outcome.UNSAFE] >= 0.6 * 20


def test_no_loss_in_few_contexts_is_not_called_safe():
    """If whole contexts are lost now and then, so few hardly show it; the interval can't know."""
    few = replace(MANY, contexts=5, turns=60, tasks=("needles",), blocks=5)
    better = Truth(nats=-0.03)
    verdict = judge(draw(1, few, topk=better)).verdicts[0]
    assert verdict.outcome is Outcome.UNKNOWN
    found = {test.measure: test for test in verdict.evidence}
    assert (found["tasks"].loss.high < 0.05, found["tasks"].contexts) == (True, 5)
    assert (found["tasks"].outcome, found["tasks"].more) == (Outcome.UNKNOWN, 60), "one context of 60 more"
    assert (
        "(-0.9 to 2.5; margin 5); 5 contexts can't show it safe; about 60 more questions would settle it"
        in verdict.sentence
    )
    assert (found["text"].outcome, found["text"].more) == (Outcome.UNKNOWN, 1)
    enough = draw(1, replace(few, contexts=6, blocks=6), topk=better)
    assert judge(enough).verdicts[0].outcome is Outcome.SAFE


@pytest.mark.stress
@pytest.mark.parametrize("edge", [Truth(nats=math.log(1.05)), Truth(lost=0.05 / 0.85)], ids=["text", "tasks"])
def test_on_the_margin_itself_either_error_is_rare(edge):
    # Drawn often enough, a rate of 5% shows as up to 8% of the runs.
    found = outcomes(FEW, edge)
    assert found[Outcome.SAFE] <= 0.08 * RUNS
    assert found[Outcome.UNSAFE] <= 0.08 * RUNS


def test_samples_that_would_settle_it_do():
    drawn = draw(3, FEW, topk=EQUAL)
    verdict = judge(drawn).verdicts[0]
    assert verdict.outcome is Outcome.UNKNOWN
    (unsettled,) = [test for test in verdict.evidence if test.decides and test.outcome is Outcome.UNKNOWN]
    assert unsettled.unit == "score"
    assert unsettled.more is not None
    contexts = math.ceil((unsettled.loss.count + unsettled.more) / 2 / FEW.turns)
    enough = replace(FEW, contexts=2 * contexts)
    assert judge(draw(3, enough, topk=EQUAL)).verdicts[0].outcome is Outcome.SAFE


def test_one_single_task_that_is_lost_for_certain_decides():
    sizes = replace(MANY, tasks=(*(f"easy{number}" for number in range(9)), "hard"))
    drawn = draw(1, sizes)
    drawn.answers = [
        replace(row, score=0.0)
        if row.deployment == TOPK.name and row.task == "hard" and row.turn < 4
        else row
        for row in drawn.answers
    ]
    verdict = judge(drawn).verdicts[0]
    pooled = next(test for test in verdict.evidence if test.measure == "tasks")
    single = {test.measure: test for test in verdict.evidence if test.measure.startswith("task:")}
    assert pooled.outcome is Outcome.SAFE, "together the loss is within the margin"
    assert single["task:hard"].outcome is Outcome.UNSAFE
    assert single["task:hard"].decides
    assert single["task:hard"].where.startswith("at depth 0.1 to 0.3: 0 of")
    assert not any(test.decides for name, test in single.items() if name != "task:hard")
    assert verdict.outcome is Outcome.UNSAFE


def test_nothing_can_be_judged_on_a_model_that_guesses():
    drawn = draw(1, replace(MANY, rounds=10, score=0.0), topk=Truth(speed=1.5))
    drawn.text = [replace(row, logprobs=tuple(value - 8.3 for value in row.logprobs)) for row in drawn.text]
    judgment = judge(drawn)
    assert judgment.verdicts[0].outcome is Outcome.UNKNOWN
    assert judgment.advice.winner == ""
    assert judgment.advice.command == ""
    assert judgment.advice.sentences[0].startswith("Nothing could be judged")
    assert any("perplexity" in remark for remark in judgment.uninformative)
    drawn.model["vocabulary_size"] = 10**9
    assert judge(drawn).verdicts[0].outcome is Outcome.SAFE, "for so many tokens that perplexity is good"


def test_where_full_fails_right_answers_are_compared():
    hard = replace(MANY, score=0.03)
    drawn = draw(1, hard, topk=Truth())
    assert judge(drawn).verdicts[0].outcome is Outcome.SAFE
    (test,) = [one for one in judge(drawn).verdicts[0].evidence if one.unit == "logprob"]
    assert (test.measure, test.decides, test.margin) == ("tasks", True, 0.1)
    worse = [
        replace(row, logprob=row.logprob - 2) if row.deployment == TOPK.name else row for row in drawn.answers
    ]
    assert judge(replace(drawn, answers=worse)).verdicts[0].outcome is Outcome.UNSAFE
    assert len(judge(drawn).uninformative) == 2


def test_a_variant_that_is_not_measured_is_not_safe():
    drawn = draw(1, MANY)
    assert judge(replace(drawn, text=[])).verdicts[0].outcome is Outcome.UNKNOWN
    assert judge(replace(drawn, answers=[])).verdicts[0].outcome is Outcome.UNKNOWN
    assert judge(replace(drawn, failed={TOPK.name: "x"})).verdicts[0].outcome is Outcome.UNKNOWN
    broken = [replace(row, error="it fell over") if row.turn == 3 and row.deployment == TOPK.name else row
              for row in drawn.answers]  # fmt: skip
    assert judge(replace(drawn, answers=broken)).verdicts[0].outcome is Outcome.UNKNOWN
    again = judge(replace(drawn, answers=[*broken, *drawn.answers]))
    assert again.verdicts[0].outcome is Outcome.SAFE, "what was measured again counts"
    empty = replace(drawn, text=[], answers=[], memory=[])
    assert judge(empty).advice.winner == ""
    assert judge(empty).verdicts[0].outcome is Outcome.UNKNOWN


def test_tasks_that_were_not_asked_are_not_safe():
    drawn = draw(1, MANY)
    assert judge(drawn).verdicts[0].outcome is Outcome.SAFE
    more = replace(drawn, plan=replace(drawn.plan, tasks=(*MANY.tasks, "cwe")))
    verdict = judge(more).verdicts[0]
    assert verdict.outcome is Outcome.UNKNOWN
    assert "not measured yet: cwe at 4k" in verdict.sentence
    assert open_tests(verdict) >= {("tasks", LONG)}


def test_answers_that_were_held_against_nothing_count_for_nothing():
    drawn = draw(1, replace(MANY, lengths=(1024,), candidates=(FULL, WINDOW)), window=EQUAL)
    own = [replace(row, task="own", length=0, score=math.nan, answer=()) for row in drawn.answers]
    plan = replace(drawn.plan, own="mine.jsonl")
    verdict = judge(replace(drawn, plan=plan, answers=[*drawn.answers, *own])).verdicts[0]
    (test,) = [one for one in verdict.evidence if one.measure == "own"]
    assert (test.loss.count, test.outcome, verdict.outcome) == (0, Outcome.UNKNOWN, Outcome.UNKNOWN)
    half = [
        replace(row, score=0.97) if row.deployment == WINDOW.name and row.turn % 2 else row for row in own
    ]
    verdict = judge(replace(drawn, plan=plan, answers=[*drawn.answers, *half])).verdicts[0]
    (test,) = [one for one in verdict.evidence if one.measure == "own"]
    assert (test.unit, test.loss.count, test.outcome) == ("agreement", 16 * 6, Outcome.SAFE)


def test_few_questions_do_not_pass_for_safety_where_full_may_fail():
    drawn = draw(1, replace(MANY, contexts=1, score=0.0))
    verdict = judge(drawn).verdicts[0]
    assert verdict.outcome is Outcome.UNKNOWN
    test = next(one for one in verdict.evidence if one.measure == "tasks")
    assert (test.outcome, test.note, test.more) == (Outcome.UNKNOWN, "too few questions yet", test.loss.count)


def test_any_subset_of_rows_is_judged():
    random = np.random.default_rng(1)
    whole = draw(1, Sizes(blocks=8, tokens=2, contexts=3, turns=3, rounds=6))
    for _ in range(30):
        part = replace(whole)
        for name in ("answers", "text", "speed", "memory"):
            kept = random.random(len(getattr(whole, name))) < random.choice([0.0, 0.1, 0.9])
            setattr(part, name, [row for row, keep in zip(getattr(whole, name), kept, strict=True) if keep])
        judgment = judge(part)
        assert len(judgment.verdicts) == 2
        for verdict in judgment.verdicts:
            decided = [test for test in verdict.evidence if test.decides]
            pending = [test for test in decided if not test.loss.claimed]
            assert not (pending and verdict.outcome is Outcome.SAFE)
            assert verdict.sentence.startswith(verdict.deployment)
        assert judgment.advice.sentences


def test_guessing_by_the_size_of_the_vocabulary():
    assert 1500 < frequency_perplexity(49_152) < 2500
    assert 60 < frequency_perplexity(256) < 90
    assert frequency_perplexity(0) == math.inf


def test_one_hypothesis_has_one_outcome():
    """The only task of a length is all its tasks; tests of the same numbers don't contradict each other."""
    loss = Interval(0.4, 0.1, 0.7, 36)
    tasks = Evidence("v", "tasks", LONG, "score", loss, 0.05, 0.9, 0.5, Outcome.UNKNOWN, contexts=6)
    alone = replace(tasks, measure="task:needles", decides=False)
    # More deciding tests need more of each; the single one by itself has its level to itself.
    others = [
        replace(tasks, measure="text", unit="perplexity", length=length, loss=Interval(0.0, -0.1, 0.1, 9))
        for length in (1024, 2048, LONG)
    ]
    ground = Ground({LONG: ("needles",)}, {LONG: ()}, {LONG: ()}, frozenset(), frozenset(), None, ())
    together, single = decide([*others, tasks, alone], 0.95, ground)[-2:]
    assert (together.outcome, single.outcome) == (Outcome.UNSAFE, Outcome.UNSAFE)
    other = replace(alone, loss=Interval(0.1, -0.1, 0.3, 18))
    together, single = decide([*others, tasks, other], 0.95, ground)[-2:]
    assert (together.outcome, single.outcome) == (Outcome.UNKNOWN, Outcome.UNKNOWN)


def test_a_comparison_is_whole_where_nothing_failed_or_was_refused():
    whole = draw(1, Sizes(contexts=2, blocks=8))
    assert is_whole(whole)
    assert not is_whole(replace(whole, failed={TOPK.name: "gone"}))
    for kind in ("answers", "text", "memory"):
        rows = getattr(whole, kind)
        last = next(row for row in reversed(rows) if row.deployment == TOPK.name)
        refused = replace(last, error="too long")
        others = [row for row in rows if row is not last]
        assert not is_whole(replace(whole, **{kind: [*others, refused]}))
        assert is_whole(replace(whole, **{kind: [refused, *rows]})), "it was done again"


def test_where_it_sees_the_whole_context_a_test_takes_no_level_from_others():
    """A window that covers the shorter of two lengths: only the longer one can lose anything."""
    loss = Interval(0.417, 0.1, 0.734, 36)
    tasks = Evidence("v", "tasks", LONG, "score", loss, 0.05, 0.9, 0.5, Outcome.UNKNOWN, contexts=3)
    ground = Ground({LONG: ("needles",)}, {LONG: ()}, {LONG: ()}, frozenset(), frozenset(), None, ())
    nothing = replace(tasks, length=1024, loss=Interval(0.0, -0.01, 0.01, 36))
    equal = [replace(nothing, note=EQUAL_NOTE, decides=False, measure=name) for name in ("text", "tasks")]
    assert decide([*equal, tasks], 0.95, ground)[-1].outcome is Outcome.UNSAFE
    assert decide([nothing, replace(nothing, measure="text"), tasks], 0.95, ground)[-1].outcome is (
        Outcome.UNKNOWN
    )
    broken = [replace(test, loss=loss) for test in equal]
    assert decide([*broken, nothing], 0.95, ground)[0].outcome is Outcome.UNKNOWN, "two tests share its level"
    surely = [replace(test, loss=Interval(0.417, 0.3, 0.534, 36)) for test in equal]
    assert {test.outcome for test in decide([*surely, nothing], 0.95, ground)[:2]} == {Outcome.UNSAFE}


def test_settling_a_small_loss_takes_the_contexts_that_safety_takes():
    near = Evidence("v", "tasks", LONG, "score", Interval(0.0, -0.06, 0.06, 36), 0.05, 1, 1, Outcome.UNKNOWN)
    ground = Ground({LONG: ("needles",)}, {LONG: ()}, {LONG: ()}, frozenset(), frozenset(), None, ())
    (test,) = decide([replace(near, contexts=3)], 0.95, ground)
    assert (test.outcome, test.more) == (Outcome.UNKNOWN, 36), "three contexts more, of 12 questions"
