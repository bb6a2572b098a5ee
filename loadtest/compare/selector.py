"""A selection's losses from poor ranking and from a small budget, told apart by the oracle."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.compare.pareto import loss
from loadtest.compare.phrases import amount
from loadtest.compare.types import Comparison, Evidence, Verdict
from loadtest.measuring.types import length_label


def selectors(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[str]:
    """Whether the budget or the selection loses, for each top-k candidate with an oracle of the same budget.

    The loss of the truly best tokens is the budget's; the rest is the selector's.
    """
    budgets = {
        (one.options.get("pattern"), one.options.get("budget", "")): one.name
        for one in comparison.plan.candidates
    }
    by_name = {verdict.deployment: verdict for verdict in verdicts}
    context = comparison.plan.contexts[-1]
    sentences = []
    for (pattern, budget), name in budgets.items():
        oracle = budgets.get(("oracle", budget))
        if pattern != "topk" or oracle is None or loss(by_name[name], context) <= 0:
            continue
        pairs = [
            (test, same)
            for test in by_name[name].evidence
            if test.length == context and test.measure in ("text", "tasks") and test.loss.count
            if (same := _same_test(by_name[oracle], test))
        ]
        if pairs:
            said = "; ".join(_sentence(own, best) for own, best in pairs)
            sentences += [
                f"{name} beside {oracle}, which sees the tokens that truly weigh most, at "
                f"{length_label(context)}: {said}",
                f"The loss of {oracle} is the budget's price; the rest of {name}'s comes from how it selects"
                if any(_apart(own, best) for own, best in pairs)
                else "Their intervals overlap: no loss is shown to come from how it selects",
            ]
    return sentences


def _same_test(verdict: Verdict, test: Evidence) -> Evidence | None:
    key = (test.measure, test.length, test.unit)
    found = (one for one in verdict.evidence if (one.measure, one.length, one.unit) == key and one.loss.count)
    return next(found, None)


def _apart(own: Evidence, best: Evidence) -> bool:
    """The variant surely loses more than the oracle."""
    return own.loss.claimed and best.loss.claimed and own.loss.low > best.loss.high


def _sentence(own: Evidence, best: Evidence) -> str:
    write = amount(own.unit)
    mine, least = write(own.loss.value), write(best.loss.value)
    match own.unit:
        case "perplexity":
            return f"perplexity {mine} and {least} times full's"
        case "logprob":
            return f"{mine} and {least} nats per token lost where full fails"
    return f"{mine} and {least} of 100 points lost in tasks"
