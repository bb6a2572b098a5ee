"""Lines that a terminal shows below the figures of a comparison; none where there is nothing to say."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.columns import figure
from loadtest.compare.effective import effective_length
from loadtest.compare.gains import PER_MEMORY, under_load
from loadtest.compare.phrases import effective_words, ends, setting, times
from loadtest.compare.types import Comparison, Evidence, Judgment
from loadtest.measuring.busy import not_counted
from loadtest.measuring.types import length_label


def lines(comparison: Comparison, judgment: Judgment) -> list[RenderableType]:
    """Effective lengths, likeness, the user's own questions, speed per memory, Pareto fronts, and
    rounds that did not count.

    Args:
        comparison: with the rows.
        judgment: of it.
    """
    return [
        *_effective(comparison),
        *_likeness(comparison, judgment),
        *_own(comparison, judgment),
        *_per_memory(comparison, judgment),
        *_fronts(comparison, judgment),
        *_not_counted(comparison),
    ]


def item(sentence: str, style: str) -> RenderableType:
    """A sentence as one of a list."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text("-", style=style), Text(sentence))
    return grid


def _effective(comparison: Comparison) -> list[RenderableType]:
    """The longest context at which each keeps the share of full's score that ``Margins`` names."""
    plan = comparison.plan
    names = [candidate.name for candidate in plan.candidates]
    found = {name: effective_length(comparison, name) for name in names}
    if found[names[0]] is None or len(plan.contexts) < 2:
        return []
    said = ", ".join(
        f"{name} {effective_words(one.length, one.least, one.most)}" for name, one in found.items() if one
    )
    shortest = length_label(plan.contexts[0])
    share = f"{setting(plan.margins.effective)} of full's score at {shortest}"
    sure = f"in brackets what is sure at {setting(plan.confidence)} confidence"
    return [Text(f"\nEffective length ({share} kept; {sure}): {said}")]


def _likeness(comparison: Comparison, judgment: Judgment) -> list[RenderableType]:
    """How often each variant's most likely next token is full's, and how far its distributions are."""
    context = comparison.plan.contexts[-1]
    said = [
        item(
            f"{verdict.deployment}: {_share(one.same_top.value)}{ends(one.same_top, _share)}; "
            f"{one.kl.value:.3f}{ends(one.kl, '{:.3f}'.format)}",
            "dim",
        )
        for verdict in judgment.verdicts
        for one in verdict.likeness
        if one.length == context
    ]
    if not said:
        return []
    heading = f"\nText at {length_label(context)}: most likely token as full's; KL divergence, nats per token"
    return [Text(heading), *said]


def _own(comparison: Comparison, judgment: Judgment) -> list[RenderableType]:
    """How each answers the user's own questions, which belong to no context length."""
    tests = [test for one in judgment.verdicts for test in one.evidence if test.measure == "own"]
    if not any(test.loss.count for test in tests):
        return [Text("\nYour own questions: none asked yet")] if comparison.plan.own else []
    lines = []
    if known := [test for test in tests if test.unit == "score" and test.loss.count]:
        found = [(comparison.plan.full, known[0].full)]
        found += [(test.deployment, test.own) for test in known]
        scores = ", ".join(f"{name} {score:.2f}" for name, score in found)
        lines.append(f"Your own questions, share of right answers in {_counts(known)}: {scores}")
    if free := [test for test in tests if test.unit == "agreement" and test.loss.count]:
        shares = ", ".join(f"{test.deployment} {1 - test.loss.value:.0%}" for test in free)
        lines.append(
            "Your own questions without a known answer, share of an answer up to its first difference from "
            f"full's in {_counts(free)}: "
            f"{shares}"
        )
    return [Text("\n" + "\n".join(lines))]


def _per_memory(comparison: Comparison, judgment: Judgment) -> list[RenderableType]:
    """Tokens per second for each GiB of KV cache in use, where several users were measured."""
    lines = []
    for load in comparison.plan.loads:
        gains = [gain for one in judgment.verdicts if (gain := under_load(one.gains, load, PER_MEMORY))]
        gains = [gain for gain in gains if gain.own.count]
        if gains:
            said = [f"{comparison.plan.full} {figure(gains[0].full.value)}"]
            said += [
                f"{gain.deployment} {figure(gain.own.value)} ({times(gain.ratio.value)} x"
                f"{'; ' * gain.ratio.claimed}{ends(gain.ratio, times).strip(' ()')})"
                for gain in gains
            ]
            lines.append(f"Tokens per second per GiB of KV cache in use, {load.label}: {', '.join(said)}")
    return [Text("\n" + "\n".join(lines))] if lines else []


def _fronts(comparison: Comparison, judgment: Judgment) -> list[RenderableType]:
    """The variants that no other beats in quality and in price at once."""
    speed, memory = judgment.advice.quality_speed, judgment.advice.quality_memory
    parts = [f"speed: {', '.join(speed)}"] if speed else []
    parts += [f"KV memory of a sequence: {', '.join(memory)}"] if memory else []
    if not parts:
        return []
    at = length_label(comparison.plan.contexts[-1])
    same = "every server with as much KV memory"
    return [Text(f"\nPareto fronts at {at}, {same}: quality against {'; against '.join(parts)}")]


def _not_counted(comparison: Comparison) -> list[RenderableType]:
    said = not_counted(comparison.speed)
    return [Text("\n" + "\n".join(said), style="dim")] if said else []


def _counts(tests: Sequence[Evidence]) -> str:
    counts = sorted({test.loss.count for test in tests})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
