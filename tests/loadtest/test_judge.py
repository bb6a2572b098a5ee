"""The judgment, on comparisons with known truth."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from attention.patterns import sparse as sparse_patterns
from attention.patterns.sliding_window import SlidingWindow
from loadtest.compare.equal import covers, equal_pairs, equal_work
from loadtest.compare.evidence import is_whole
from loadtest.compare.ground import Ground, frequency_perplexity
from loadtest.compare.holm import holm, p_worse
from loadtest.compare.judge import decide, judge
from loadtest.compare.run import speeds_settled
from loadtest.compare.stopping import is_firm, open_tests, widening
from loadtest.compare.types import Evidence, Outcome
from loadtest.deployment import Deployment, sparse
from loadtest.measuring.types import Interval, Load
from loadtest.student import student_quantile, student_tail
from tests.loadtest.synthetic import DECODE, FULL, LONG, PROMPT, TOPK, WINDOW, Sizes, Truth, draw

RUNS = 200
# Quality alone, of one variant at one length. The margins are 5% of perplexity and 5 points.
ONE = {"rounds": 0, "lengths": (LONG,), "candidates": (FULL, TOPK)}
FEW = Sizes(blocks=10, tokens=4, contexts=4, turns=6, **ONE)
MANY = Sizes(blocks=24, tokens=4, contexts=16, turns=12, **ONE)
# Disagrees with full on one question in twelve, and is as good.
EQUAL = Truth(lost=0.05, won=0.05 * 0.85 / 0.15)


def outcomes(sizes, truth, runs=RUNS):
    return Counter(judge(draw(seed, sizes, topk=truth)).verdicts[0].outcome for seed in range(runs))


def test_what_is_as_good_is_hardly_ever_called_unsafe():
    assert outcomes(FEW, EQUAL)[Outcome.UNSAFE] <= 0.05 * RUNS


def test_what_is_as_good_is_found_safe_by_many_samples():
    found = outcomes(MANY, EQUAL, 20)
    assert found[Outcome.SAFE] >= 0.6 * 20
    assert not found[Outcome.UNSAFE]
    assert outcomes(MANY, Truth(), 10) == {Outcome.SAFE: 10}


@pytest.mark.parametrize("worse", [Truth(nats=math.log(1.1)), Truth(lost=0.1 / 0.85)], ids=["text", "tasks"])
def test_what_is_worse_by_twice_the_margin_is_hardly_ever_called_safe(worse):
    found = outcomes(FEW, worse)
    assert found[Outcome.SAFE] <= 0.05 * RUNS
    assert found[Outcome.UNSAFE] > 0


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


# Milliseconds per token of the quick form on a machine in five states: full and a window at 1k, where both do
# the same, full and top-k at 4k.
WEATHER = [
    (4.46, 3.70, 5.46, 4.93),
    (3.53, 3.58, 5.98, 4.57),
    (411, 4.03, 19.8, 18.9),
    (54, 2018, 5.47, 82.6),
    (5.64, 7.88, 145, 13.0),
]


def timed(rows, seed=1):
    """A comparison whose rounds take these times, as (full, window at 1k, full, top-k at 4k)."""
    drawn = draw(seed, replace(MANY, rounds=len(rows), lengths=(1024, LONG), candidates=(FULL, WINDOW, TOPK)))
    columns = {(FULL.name, 1024): 0, (WINDOW.name, 1024): 1, (FULL.name, LONG): 2, (TOPK.name, LONG): 3}
    labels = {load.label: load.context for load in drawn.plan.loads}
    drawn.speed = [
        replace(
            cell,
            figures={"tpot": rows[cell.round][column] / 1e3, "output_rate": 1e3 / rows[cell.round][column]},
        )
        for cell in drawn.speed
        if (column := columns.get((cell.deployment, labels[cell.load]))) is not None
    ]
    return drawn


@pytest.mark.parametrize("row", WEATHER)
def test_one_round_in_whatever_weather_proves_no_gain(row):
    judgment = judge(timed([row]))
    assert judgment.advice.winner == FULL.name
    assert not any(gain.different for verdict in judgment.verdicts for gain in verdict.gains)


def test_all_weathers_together_prove_none_either():
    judgment = judge(timed([*WEATHER, *WEATHER]))
    assert judgment.advice.winner == FULL.name
    assert not any(gain.different for verdict in judgment.verdicts for gain in verdict.gains)


def test_noise_is_no_gain_and_a_gain_is_found():
    speeds = Sizes(
        blocks=8, tokens=2, contexts=8, turns=10, lengths=(LONG,), candidates=(FULL, TOPK), noise=0.1
    )
    winners = Counter(judge(draw(seed, speeds)).advice.winner for seed in range(20))
    assert winners == {FULL.name: 20}
    assert judge(draw(1, speeds, topk=Truth(speed=1.3))).advice.winner == TOPK.name


def test_a_gain_that_is_certain_and_small_is_not_worth_a_change():
    sizes = replace(MANY, rounds=20, noise=0.005)
    judgment = judge(draw(1, sizes, topk=Truth(speed=1.03)))
    assert judgment.advice.winner == FULL.name
    assert any(gain.different for gain in judgment.verdicts[0].gains)


def test_between_equal_gains_the_first_token_decides():
    faster = Deployment("other", "sliding_window", {"window": "100", "sinks": "4"})
    sizes = replace(MANY, rounds=10, candidates=(FULL, TOPK, faster))
    drawn = draw(1, sizes, topk=Truth(speed=1.31), other=Truth(speed=1.3))
    assert judge(drawn).advice.winner in (TOPK.name, "other")
    for slower, winner in ((TOPK.name, "other"), ("other", TOPK.name)):
        slow = [
            replace(cell, figures={**cell.figures, "ttft": 2 * cell.figures["ttft"]})
            if cell.deployment == slower and "ttft" in cell.figures
            else cell
            for cell in drawn.speed
        ]
        assert judge(replace(drawn, speed=slow)).advice.winner == winner


def test_under_many_users_tokens_per_second_decide():
    drawn = draw(1, replace(MANY, rounds=10), topk=Truth(speed=1.3))
    users = replace(DECODE, concurrency=8)
    drawn.plan = replace(drawn.plan, loads=(users,))
    cells = [replace(cell, load=users.label) for cell in drawn.speed if cell.load == DECODE.label]
    drawn.speed = [replace(cell, figures={**cell.figures, "tpot": 0.005}) for cell in cells]
    assert judge(drawn).advice.winner == TOPK.name
    drawn.speed = [replace(cell, figures={**cell.figures, "output_rate": 200.0}) for cell in cells]
    assert judge(drawn).advice.winner == FULL.name


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


def test_what_is_not_measured_is_not_safe():
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


def test_an_exact_backend_is_safe_unless_it_is_broken():
    flash = Deployment("flash", "flash")
    sizes = replace(FEW, candidates=(FULL, flash))
    assert judge(draw(1, sizes)).verdicts[0].outcome is Outcome.SAFE
    assert not any(test.decides for test in judge(draw(1, sizes)).verdicts[0].evidence)
    broken = judge(draw(1, sizes, flash=Truth(nats=0.2))).verdicts[0]
    assert broken.outcome is Outcome.UNSAFE
    assert "this is a fault" in broken.sentence


def test_a_context_that_a_variant_covers_needs_no_test():
    sizes = replace(FEW, lengths=(1024,), candidates=(FULL, WINDOW))
    verdict = judge(draw(1, sizes, window=EQUAL)).verdicts[0]
    assert verdict.outcome is Outcome.SAFE
    assert not any(test.decides for test in verdict.evidence)


@pytest.mark.parametrize(
    ("attention", "options", "most"),
    [
        ("sliding_window", {"window": "1020", "sinks": "4", "positions": "original"}, 1024),
        ("sparse", {"pattern": "longformer", "window": "512", "global_tokens": "16"}, 528),
        ("sparse", {"pattern": "segment", "segment": "512", "sinks": "4"}, 1024),
        ("sparse", {"pattern": "bigbird", "block": "64", "window_blocks": "3", "random_blocks": "0"}, 256),
        ("sparse", {"pattern": "lsh", "window": "128", "sinks": "4", "buckets": "128"}, 132),
        ("sparse", {"pattern": "topk", "budget": "512"}, 512),
        ("sparse", {"pattern": "oracle", "budget": "512"}, 512),
    ],
)
def test_covered_contexts_by_the_pattern_itself(attention, options, most):
    assert covers(attention, options, most)
    assert not covers(attention, options, most + 1)
    if options.get("pattern") in ("topk", "oracle"):
        return
    pattern = (SlidingWindow if attention == "sliding_window" else sparse_patterns).from_options(options)
    for tokens, whole in ((most, True), (most + 1, False)):
        at = torch.arange(tokens)
        seen = pattern.visible(at[:, None], at[None])
        if options.get("pattern") == "lsh":  # what it sees for certain
            seen = (at[None] < 4) | (at[:, None] - at[None] < 128)
        assert bool((seen | (at[None] > at[:, None])).all()) == whole


def test_equal_work():
    drawn = draw(1, replace(FEW, lengths=(512, LONG), candidates=(FULL, TOPK, WINDOW, sparse("x", "new"))))
    short, long = replace(DECODE, context=512), DECODE
    assert equal_work(drawn, TOPK.name, short, "tpot")
    assert not equal_work(drawn, TOPK.name, long, "tpot")
    assert equal_work(drawn, TOPK.name, PROMPT, "ttft"), "prompts are left alone"
    assert not equal_work(drawn, WINDOW.name, PROMPT, "ttft")
    assert not equal_work(drawn, TOPK.name, Load(LONG, 64, concurrency=8), "ttft"), "others decode beside it"
    assert not equal_work(drawn, "x", short, "tpot"), "of an unknown pattern nothing is known"
    assert {pair.first for pair in equal_pairs(drawn)} == {FULL.name}
    assert {(pair.second, pair.load.split(",")[0]) for pair in equal_pairs(drawn)} == {
        (TOPK.name, "512"),
        (WINDOW.name, "512"),
    }
    drawn.running[TOPK.name]["kernel"] = "sdpa"
    assert not equal_work(drawn, TOPK.name, short, "tpot"), "another kernel"
    drawn.running.clear()
    assert not equal_work(drawn, WINDOW.name, short, "tpot"), "options in force are not known"


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


def test_whatever_rows_there_are_it_judges():
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


def test_pareto_fronts():
    others = tuple(Deployment(name, "sliding_window", {"window": name}) for name in ("fast", "slow", "small"))
    sizes = replace(MANY, rounds=10, noise=0.01, candidates=(FULL, TOPK, *others))
    truths = {
        "topk": Truth(speed=1.3),
        "fast": Truth(nats=0.1, speed=1.6, memory=2),
        "slow": Truth(nats=0.2, speed=1.2, memory=1.5),
        "small": Truth(nats=0.3, speed=0.9, memory=4),
    }
    drawn = draw(1, sizes, **truths)
    advice = judge(drawn).advice
    assert advice.quality_speed == (TOPK.name, "fast"), "slow loses more than fast, full is as good as top-k"
    assert advice.quality_memory == (FULL.name, TOPK.name, "fast", "small")
    without = judge(replace(drawn, busy="too busy")).advice
    assert (without.quality_speed, without.quality_memory) == ((), advice.quality_memory)
    fewer = judge(replace(drawn, failed={"fast": "it fell over"})).advice
    assert fewer.quality_speed == (TOPK.name,)


def test_full_alone_is_judged():
    judgment = judge(draw(1, replace(FEW, candidates=(FULL,), rounds=6)))
    assert judgment.verdicts == ()
    assert judgment.advice.winner == FULL.name


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


def test_guessing_by_the_size_of_the_vocabulary():
    assert 1500 < frequency_perplexity(49_152) < 2500
    assert 60 < frequency_perplexity(256) < 90
    assert frequency_perplexity(0) == math.inf


def test_one_hypothesis_has_one_outcome():
    """The only task of a length is all its tasks; tests of the same numbers don't contradict each other."""
    loss = Interval(0.4, 0.1, 0.7, 36)
    tasks = Evidence("v", "tasks", LONG, "score", loss, 0.05, 0.9, 0.5, Outcome.UNKNOWN, contexts=6)
    alone = replace(tasks, measure="task:needles", decides=False)
    # More deciding tests need more of each; the single one by itself has its level alone.
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
