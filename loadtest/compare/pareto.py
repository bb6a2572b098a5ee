"""Pareto fronts: variants that no other beats in quality and in price at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loadtest.compare.gains import deciding_figure, is_served, operators_load
from loadtest.compare.types import Comparison, Verdict


def loss(verdict: Verdict, context: int) -> float:
    """A variant's loss at a context, in margins: 1 is exactly the allowed loss.

    Of the text, the tasks and the user's own questions the one that loses most counts, as in the verdict. A
    loss that may be none counts as none. NaN where nothing was measured.
    """
    if verdict.exact:
        return 0.0
    tests = [
        test
        for test in verdict.evidence
        if test.length in (0, context) and not test.measure.startswith("task:") and test.loss.count
    ]
    losses = [test.loss.value / test.margin if test.loss.excludes(0.0) else 0.0 for test in tests]
    return max(0.0, *losses) if losses else math.nan


def fronts(comparison: Comparison, verdicts: Sequence[Verdict]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fronts of quality against speed, and against KV bytes, at the longest context.

    Speed is the figure of the operator's load. A difference of speed that isn't shown counts as none. With
    the same memory, sequences that fit are in the order of bytes.

    Returns:
        Names in the plan's order, full attention among them where nothing beats it.
    """
    context = comparison.plan.contexts[-1]
    full = comparison.plan.full
    load = operators_load(comparison, context)
    losses = {full: 0.0} | {one.deployment: loss(one, context) for one in verdicts}
    speeds, memories = {full: 1.0}, {full: 1.0}
    for verdict in verdicts:
        if verdict.deployment in comparison.failed or not is_served(comparison, verdict.deployment):
            continue
        for gain in verdict.gains:
            if gain.context != context or not gain.ratio.claimed:
                continue
            if load and (gain.load, gain.figure) == (load.label, deciding_figure(load)):
                speeds[verdict.deployment] = gain.ratio.value if gain.different else 1.0
            elif gain.figure == "bytes":
                memories[verdict.deployment] = gain.ratio.value
    return _front({} if comparison.busy else speeds, losses), _front(memories, losses)


def _front(times_better: Mapping[str, float], losses: Mapping[str, float]) -> tuple[str, ...]:
    points = {
        name: (losses[name], -better) for name, better in times_better.items() if not math.isnan(losses[name])
    }

    def beaten(own: tuple[float, float]) -> bool:
        return any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in points.values())

    return tuple(name for name, point in points.items() if not beaten(point))
