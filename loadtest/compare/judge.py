"""From a comparison to its judgment: tests of non-inferiority, and what to deploy.

A variant is safe if in every deciding test the upper end of its loss lies within the margin. That is an
intersection-union test (Berger: Multiparameter Hypothesis Testing and Acceptance Sampling, 1982): all have to
pass, so the chance of a wrong "safe" is at most that of one test, and no correction is needed. No interval
knows of a loss that strikes whole contexts and has struck none yet, so each test takes ``least`` contexts: 6
at a confidence of 95%, so many that a loss in half of all contexts would hardly go unseen.

It is not safe if in some test the loss is beyond the margin. Here each further test is a further chance to be
wrong, so Holm's correction keeps that chance for all tests of a variant together: the deciding ones share one
side of the interval (2.5% at a confidence of 95%), the single tasks as much again, so that a wrong "not
safe" has at most the chance that the confidence leaves. Tests where a variant sees the whole context look for
faults. Their loss is 0 but for rounding, so that they hardly add to that chance; they have a family of their
own, else they would take level from those that can lose something. Where a length has a single task, its
test and that of all tasks are the same and have one outcome. Else there is not enough evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from loadtest.compare import analysis, words
from loadtest.compare.advice import advise
from loadtest.compare.effective import effective_length
from loadtest.compare.evidence import EQUAL, FULL_FAILS, failures, is_exact, tests
from loadtest.compare.gains import gains
from loadtest.compare.ground import Ground, survey
from loadtest.compare.holm import contexts_of, holm, p_worse, with_many
from loadtest.compare.types import Comparison, Evidence, Judgment, Likeness, Outcome, Verdict
from loadtest.measuring.statistics import least, score_to_settle, to_settle


def judge(comparison: Comparison) -> Judgment:
    """Judges what a comparison has so far; every sentence follows from its numbers.

    Args:
        comparison: complete or under way; its first candidate is the baseline of the others.
    """
    ground = survey(comparison)
    names = [one.name for one in comparison.plan.candidates[1:]]
    verdicts = tuple(_verdict(_pair(comparison, name), name, ground) for name in names)
    return Judgment(verdicts, advise(comparison, verdicts, ground), ground.remarks)


def _pair(comparison: Comparison, name: str) -> Comparison:
    """The comparison with only the rows of this one and of full attention: fewer to search."""
    kept = (comparison.plan.full, name)
    return replace(
        comparison,
        answers=[row for row in comparison.answers if row.deployment in kept],
        text=[row for row in comparison.text if row.deployment in kept],
        speed=[row for row in comparison.speed if row.deployment in kept],
    )


def _verdict(comparison: Comparison, name: str, ground: Ground) -> Verdict:
    evidence = decide(tests(comparison, name, ground), comparison.plan.confidence, ground)
    exact, effective = is_exact(comparison, name), effective_length(comparison, name)
    verdict = Verdict(
        name,
        _outcome(comparison, name, evidence, ground),
        tuple(evidence),
        tuple(gains(comparison, name)),
        effective.length if effective else None,
        exact,
        "",
        comparison.plan.command(name),
        _likeness(comparison, name),
        effective.least if effective else None,
        effective.most if effective else None,
    )
    return replace(verdict, sentence=words.verdict(comparison, verdict, ground))


def _likeness(comparison: Comparison, name: str) -> tuple[Likeness, ...]:
    found = (
        Likeness(
            length, analysis.text_kl(comparison, name, length), analysis.same_top(comparison, name, length)
        )
        for length in comparison.plan.contexts
    )
    return tuple(one for one in found if one.kl.count)


def decide(evidence: Sequence[Evidence], confidence: float, ground: Ground) -> list[Evidence]:
    """The tests of one candidate with their outcomes, judged together; see the module.

    A test that need not decide still does where its loss is surely beyond the margin.
    """
    able = [not _blind(test, ground) for test in evidence]
    single = [test.measure.startswith("task:") for test in evidence]
    rejected = [False] * len(evidence)
    kinds = ["fault" if test.note == EQUAL else one for test, one in zip(evidence, single, strict=True)]
    families = {kind: [n for n, one in enumerate(kinds) if able[n] and one == kind] for kind in kinds}
    for family in families.values():
        chances = [p_worse(evidence[number], confidence) for number in family]
        for number, beyond in zip(family, holm(chances, (1 - confidence) / 2), strict=True):
            rejected[number] = beyond
    # The only task of a length is all tasks of that length: one hypothesis, which has one outcome.
    for number, test in enumerate(evidence):
        if single[number]:
            same = [n for n, one in enumerate(evidence) if one.measure == "tasks" and _same(one, test)]
            for other in same:
                rejected[number] = rejected[other] = rejected[number] or rejected[other]
    return [
        _settled(test, confidence, rejected[number], able[number], len(families[kinds[number]]))
        for number, test in enumerate(evidence)
    ]


def _same(one: Evidence, other: Evidence) -> bool:
    return (one.length, one.unit, one.loss) == (other.length, other.unit, other.loss)


def _blind(test: Evidence, ground: Ground) -> bool:
    """Full attention itself has nothing to lose there."""
    if test.note == FULL_FAILS:
        return True
    if test.measure == "own":
        return test.unit == "score" and ground.own is False
    guessed = test.length in ground.guessed
    return guessed and (test.measure == "text" or not ground.tells(test.length))


def _settled(test: Evidence, confidence: float, rejected: bool, able: bool, tests_made: int) -> Evidence:
    if not able:
        return test
    if rejected:
        return replace(test, outcome=Outcome.UNSAFE, decides=True)
    lacking = least(confidence) - contexts_of(test)
    # As many samples as the least number of contexts for a safe test has.
    for_safety = math.ceil(lacking * test.loss.count / contexts_of(test)) if test.loss.count else 0
    if test.loss.claimed and test.loss.high <= test.margin:
        return replace(test, more=for_safety) if lacking > 0 else replace(test, outcome=Outcome.SAFE)
    if test.loss.count and not test.loss.claimed and test.contexts == 1:
        return replace(test, more=test.loss.count)  # one context gives no interval: one more like it
    settle = score_to_settle if test.unit in ("score", "agreement") else to_settle
    more = settle(with_many(test, confidence), test.margin, confidence)
    if more is None and test.loss.value > test.margin:
        # Beyond the margin by itself, but not surely enough for one test of many.
        more = to_settle(with_many(test, confidence, tests_made), test.margin, confidence)
    more = more or math.ceil(test.loss.count / contexts_of(test))
    return replace(test, more=max(more, for_safety) if test.loss.value <= test.margin else more)


def _outcome(comparison: Comparison, name: str, evidence: Sequence[Evidence], ground: Ground) -> Outcome:
    if name in comparison.failed or ground.none:
        return Outcome.UNKNOWN
    if any(test.outcome is Outcome.UNSAFE for test in evidence):
        return Outcome.UNSAFE
    if is_exact(comparison, name):
        return Outcome.SAFE
    deciding = [test for test in evidence if test.decides]
    if failures(comparison, name) or any(test.outcome is not Outcome.SAFE for test in deciding):
        return Outcome.UNKNOWN
    if comparison.plan.candidate(name).is_reading and not deciding:
        return Outcome.UNKNOWN  # it never does the same work as full attention, which needs no test
    return Outcome.SAFE
