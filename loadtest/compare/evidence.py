"""The tests of one candidate against full attention, each with its loss, before they are judged together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from loadtest.compare import analysis
from loadtest.compare.equal import sees_all
from loadtest.compare.ground import Ground
from loadtest.compare.phrases import listed
from loadtest.compare.turns import Turns, by_turn
from loadtest.compare.types import EXACT, Comparison, Evidence, Outcome
from loadtest.evaluation.pairs import OWN, answer_key
from loadtest.evaluation.types import Answer, TextBlock
from loadtest.measuring.types import Interval

PENDING = "not measured yet"
FULL_FAILS = "full attention itself fails these, so there is nothing to lose"
EQUAL = "it sees the whole context, as full attention does"

# Share of what is lost that the depths in a sentence account for, and share of all depths up to which
# naming some tells anything.
_MOST = 0.9
_FEW = 0.6


def tests(comparison: Comparison, name: str, ground: Ground) -> list[Evidence]:
    """All tests of a candidate by length and measure, none judged yet.

    Decisive are at each length the text, the informative tasks together (points of their scores), the others
    together (log probability of the right answers), and the user's own questions. Single tasks tell where
    it loses. A candidate that computes full attention, or sees all of a context, needs no test there; it
    is measured all the same, since a variant that computes the same and yet loses is broken.

    Args:
        comparison: with the rows.
        name: of the candidate.
        ground: what full attention can do.
    """
    contexts = comparison.plan.contexts
    if comparison.plan.candidate(name).is_reading:
        read = [test for length in contexts for test in _read(comparison, name, length, ground)]
        return [_noted(comparison, test) for test in read]
    found = []
    for length in contexts:
        found += [_text(comparison, name, length, ground), *_tasks(comparison, name, length, ground)]
    return [_noted(comparison, test) for test in [*found, *_own(comparison, name, ground)]]


def _read(comparison: Comparison, name: str, length: int, ground: Ground) -> list[Evidence]:
    """The tests of a reading: scores of tasks, since it has no log probabilities of a text or an answer.

    Where full attention fails all tasks, scores can't show that nothing is lost: the test stays open, and
    tells the points.
    """
    found = [test for test in _tasks(comparison, name, length, ground) if test.unit == "score"]
    failed = ground.failed[length]
    if failed and not any(test.measure == "tasks" for test in found):
        test = _scores(comparison, name, length, "tasks", failed)
        found.append(replace(test, note=FULL_FAILS, where="where full attention itself fails"))
    return found


def is_exact(comparison: Comparison, name: str) -> bool:
    """The candidate computes full attention, whatever the context."""
    return comparison.plan.candidate(name).attention in EXACT


def _text(comparison: Comparison, name: str, length: int, ground: Ground) -> Evidence:
    loss, own = analysis.text_loss(comparison, name, length), analysis.perplexity(comparison, name, length)
    test = _test(comparison, name, "text", length, "perplexity", loss, (own / (1 + loss.value), own))
    test = replace(test, contexts=analysis.text_slices(comparison, name, length))
    if length not in ground.guessed:
        return test
    # Where tasks tell, text that full attention can't predict is no reason to withhold a verdict.
    return replace(
        test,
        decides=not ground.tells(length),
        note="full attention itself only guesses at this text",
    )


def _tasks(comparison: Comparison, name: str, length: int, ground: Ground) -> list[Evidence]:
    informative, failed, unsettled = ground.informative[length], ground.failed[length], ground.open[length]
    found = []
    if informative:
        found.append(_scores(comparison, name, length, "tasks", informative))
    elif unsettled or (comparison.plan.tasks and not failed):
        test = _scores(comparison, name, length, "tasks", unsettled)
        # Of tasks that full attention may fail, no loss is no sign of safety.
        nothing = Interval(test.loss.value, count=test.loss.count)
        found.append(replace(test, loss=nothing, contexts=1, note="too few questions yet"))
    if failed:
        found.append(_logprobs(comparison, name, length, failed))
    singles = [_scores(comparison, name, length, f"task:{task}", (task,)) for task in informative]
    if not informative and not failed:
        return found + singles
    # A task that the time did not suffice for may be the one that fails.
    unasked = [task for task in comparison.plan.tasks if task not in {*informative, *failed, *unsettled}]
    pending = [_scores(comparison, name, length, f"task:{task}", (task,)) for task in unasked]
    return found + singles + [replace(test, decides=True) for test in pending]


def _scores(comparison: Comparison, name: str, length: int, measure: str, tasks: Sequence[str]) -> Evidence:
    pairs = analysis.task_pairs(comparison, name, tasks, length)
    loss = analysis.points_lost(pairs, comparison.plan.confidence)
    means = (_mean(pair.full.score for pair in pairs), _mean(pair.own.score for pair in pairs))
    turns = by_turn(pairs, comparison.plan.confidence)
    return replace(
        _test(comparison, name, measure, length, "score", loss, means),
        decides=measure == "tasks",
        contexts=len({pair.context for pair in pairs}),
        where="; ".join(filter(None, (_where(comparison, name, length, tasks), _later(turns)))),
        turns=turns,
    )


def _logprobs(comparison: Comparison, name: str, length: int, tasks: Sequence[str]) -> Evidence:
    pairs = analysis.with_logprobs(analysis.task_pairs(comparison, name, tasks, length))
    loss = analysis.nats_lost(pairs, comparison.plan.confidence)
    means = (
        _mean(pair.full.logprob / pair.full.target_tokens for pair in pairs),
        _mean(pair.own.logprob / pair.own.target_tokens for pair in pairs),
    )
    test = _test(comparison, name, "tasks", length, "logprob", loss, means)
    return replace(test, note=f"full attention itself fails {listed(tasks)}")


def _own(comparison: Comparison, name: str, ground: Ground) -> list[Evidence]:
    if not comparison.plan.own:
        return []
    pairs = analysis.own_pairs(comparison, name)
    known = [pair for pair in pairs if not math.isnan(pair.full.score)]
    free = [pair for pair in pairs if analysis.is_free(pair)]
    found = []
    if known or not free:
        means = (_mean(pair.full.score for pair in known), _mean(pair.own.score for pair in known))
        test = _test(comparison, name, OWN, 0, "score", analysis.own_loss(comparison, name), means)
        fails = ground.own is False
        note = "full attention itself fails most of your questions" if fails else ""
        contexts = len({pair.context for pair in known})
        turns = by_turn(known, comparison.plan.confidence)
        test = replace(test, where=_later(turns), turns=turns)
        found.append(replace(test, decides=not fails, note=note, contexts=contexts))
    if free:
        loss = analysis.agreement_loss(comparison, name)
        means = (1.0, _mean(pair.own.score for pair in free))
        test = _test(comparison, name, OWN, 0, "agreement", loss, means)
        found.append(replace(test, contexts=len({pair.context for pair in free})))
    return found


def _test(
    comparison: Comparison,
    name: str,
    measure: str,
    length: int,
    unit: str,
    loss: Interval,
    means: tuple[float, float],
) -> Evidence:
    margin = getattr(comparison.plan.margins, unit)
    return Evidence(name, measure, length, unit, loss, margin, *means, Outcome.UNKNOWN)


def _noted(comparison: Comparison, test: Evidence) -> Evidence:
    """The test, with why it need not or can't decide."""
    if not test.loss.count:
        test = replace(test, note=test.note if test.unit == "logprob" else PENDING)
    if is_exact(comparison, test.deployment):
        return replace(test, decides=False, note=test.note or "it computes full attention")
    if test.length and sees_all(comparison, test.deployment, test.length):
        return replace(test, decides=False, note=EQUAL)
    return test


def _where(comparison: Comparison, name: str, length: int, tasks: Sequence[str]) -> str:
    """The depths at which most of what is lost is lost."""
    depths = analysis.by_depth(comparison, name, length, tasks)
    lost = sorted((one for one in depths if one.own < one.full), key=lambda one: one.own - one.full)
    total, shown = sum(one.full - one.own for one in lost), 0.0
    worst = []
    for one in lost:
        if shown >= _MOST * total:
            break
        worst.append(one)
        shown += one.full - one.own
    if not worst:
        return ""
    if len(worst) > _FEW * len(depths):
        places, worst = "all over the context", depths
    else:
        at = sorted(one.depth for one in worst)
        adjoin = [one.depth for one in depths if at[0] <= one.depth <= at[-1]] == at
        run = len(at) > 2 and adjoin
        places = (
            f"at depth {at[0]:g} to {at[-1]:g}" if run else f"at depth {listed([f'{one:g}' for one in at])}"
        )
    full, own = sum(one.full for one in worst), sum(one.own for one in worst)
    asked = sum(one.count for one in worst)
    return f"{places}: {own:.3g} of {asked} found where full finds {full:.3g}"


def _later(turns: Turns | None) -> str:
    """A sentence where later questions about a context certainly lose more than its first."""
    if turns is None or not turns.fails_later:
        return ""
    return (
        f"from the second question about a context on: {turns.later_own:.3g} of {turns.later} found where "
        f"full finds {turns.later_full:.3g}, by the first {turns.first_own:.3g} of {turns.first} where full "
        f"finds {turns.first_full:.3g}"
    )


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return fmean(kept) if kept else math.nan


def is_whole(comparison: Comparison) -> bool:
    """No candidate failed, and none was refused a question, a block of text or the watch on its KV cache."""
    names = [candidate.name for candidate in comparison.plan.candidates]
    held = {(row.deployment, row.length) for row in comparison.memory if not row.error}
    refused = [row for row in comparison.memory if row.error and (row.deployment, row.length) not in held]
    return not (comparison.failed or refused or any(failures(comparison, name) for name in names))


def failures(comparison: Comparison, name: str) -> list[str]:
    """Why questions or blocks of text have no result of a candidate, each reason once; retried ones aside."""
    answered = {answer_key(row) for row in comparison.answers if row.deployment == name and not row.error}
    decoded = {(row.length, row.block) for row in comparison.text if row.deployment == name and not row.error}
    rows: list[Answer | TextBlock] = [
        *(row for row in comparison.answers if answer_key(row) not in answered),
        *(row for row in comparison.text if (row.length, row.block) not in decoded),
    ]
    return list(dict.fromkeys(row.error for row in rows if row.deployment == name))
