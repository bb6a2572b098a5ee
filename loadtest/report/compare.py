"""A comparison as one HTML page: what to deploy, why, and everything that was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from loadtest.compare.types import Comparison, Evidence, Gain, Judgment, Verdict
from loadtest.measuring.types import length_label
from loadtest.report import evidence, figures, needles, page, tradeoff, view, words
from loadtest.report.memory import memory_against_length

SCHEMA = "longspan-compare-report/1"
"""Of the document in the page, where no other is given."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a comparison is.

    Attributes:
        words: what it does now.
        done: share of the whole, 0 to 1.
        left: seconds that it will probably take; NaN where nobody knows.
    """

    words: str
    done: float
    left: float


def render(
    comparison: Comparison,
    judgment: Judgment,
    *,
    live: bool = False,
    progress: Progress | None = None,
    document: Any = None,
) -> str:
    """The page.

    Args:
        comparison: what was measured.
        judgment: what follows from it.
        live: the page asks its server for news; see ``loadtest.report.live``.
        progress: of a comparison that is still going on.
        document: mapping to embed and offer for download; by default both arguments under their names.
    """
    context = view.longest(comparison)
    if document is None:
        document = {"schema": SCHEMA, "comparison": comparison, "judgment": judgment}
    drawings = [
        tradeoff.quality_against_speed(comparison, judgment),
        tradeoff.quality_against_memory(comparison, judgment),
        memory_against_length(comparison),
    ]
    return page.render(
        "compare.html.j2",
        title=f"Which attention for {comparison.model.get('name', 'this model')}?",
        live=live,
        progress=None if progress is None else asdict(progress),
        advice=judgment.advice,
        tiles=_tiles(comparison, judgment),
        busy=judgment.busy or comparison.busy,
        failed=comparison.failed,
        variants=[_variant(comparison, verdict) for verdict in judgment.verdicts],
        context=context,
        load=view.operators_load(comparison, context),
        summary=_summary(comparison, judgment),
        drawings=[drawing for drawing in drawings if drawing is not None],
        needles=needles.tables(comparison),
        scale=evidence.scale(),
        heads=figures.HEADS,
        figures=figures.rows(judgment),
        numbers=view.numbers(comparison),
        uninformative=judgment.uninformative,
        facts=_facts(comparison),
        full_command=comparison.plan.candidates[0].command,
        full_name=comparison.plan.candidates[0].name,
        confidence=f"{comparison.plan.confidence:.0%}",
        json=page.embedded(document),
        json_name="longspan-compare.json",
    )


def _tiles(comparison: Comparison, judgment: Judgment) -> list[dict[str, str]]:
    """What the winner brings and costs at the longest context, a figure each."""
    verdict = next((one for one in judgment.verdicts if one.deployment == judgment.advice.winner), None)
    if verdict is None:
        return []
    context = view.longest(comparison)
    gains = [
        (label, view.gain(verdict, comparison, context, figure))
        for figure, label in (
            ("tpot", "speed per token"),
            ("ttft", "speed to first token"),
            ("bytes", "less KV memory"),
        )
    ]
    tests = [
        (label, view.first(verdict.evidence, measure, context))
        for measure, label in (("text", "text"), ("tasks", "tasks"), ("own", "your questions"))
    ]
    tiles = [_gain_tile(label, gain) for label, gain in gains if gain is not None]
    return tiles + [_test_tile(label, test) for label, test in tests if test is not None]


def _gain_tile(label: str, gain: Gain) -> dict[str, str]:
    note = words.ends(words.ratio, gain.ratio) if gain.ratio.claimed else ""
    if gain.ratio.claimed and not gain.different:
        note = f"{note}: no difference shown"
    return {"label": label, "value": words.ratio(gain.ratio.value), "note": note}


def _test_tile(label: str, test: Evidence) -> dict[str, str]:
    note = f"{_ends(test)}; up to {words.loss(test.unit, test.margin)} allowed"
    name = {"perplexity": "perplexity of the text", "score": f"lost in {label}"}.get(test.unit, label)
    return {"label": name, "value": words.loss(test.unit, test.loss.value), "note": note}


def _variant(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.deployment,
        "number": view.numbers(comparison)[verdict.deployment],
        "badge": view.badge(verdict.outcome),
        "sentence": verdict.sentence,
        "command": verdict.command,
        "exact": verdict.exact,
        "effective": _effective(verdict),
        "kernel": comparison.running.get(verdict.deployment, {}).get("kernel", ""),
        "deciding": evidence.rows([one for one in verdict.evidence if one.decides]),
        "others": evidence.rows([one for one in verdict.evidence if not one.decides]),
    }


def _effective(verdict: Verdict) -> str:
    if verdict.effective is None:
        return words.NONE
    return length_label(verdict.effective) if verdict.effective else "none"


_SPEEDS = ("ttft", "tpot", "output_rate", "bytes", "fits")
_TESTS = (("text", "text"), ("tasks", "tasks"), ("own", "own questions"))


def _summary(comparison: Comparison, judgment: Judgment) -> dict[str, Any]:
    """The table of the longest context: full attention's own figures, and the others' beside it."""
    context = view.longest(comparison)
    speeds = [
        figure
        for figure in _SPEEDS
        if any(view.gain(verdict, comparison, context, figure) for verdict in judgment.verdicts)
    ]
    tests = [
        (measure, label)
        for measure, label in _TESTS
        if any(view.first(verdict.evidence, measure, context) for verdict in judgment.verdicts)
    ]
    heads = ["attention", "outcome", *(words.FIGURES[figure] for figure in speeds)]
    heads += [f"loss: {label}" for _, label in tests] + ["effective length"]
    own = {
        figure: next(
            words.measured(figure, gain.full.value)
            for verdict in judgment.verdicts
            if (gain := view.gain(verdict, comparison, context, figure))
        )
        for figure in speeds
    }
    full: list[tuple[str, float | str, str]] = [("held against", "", "")]
    full += [(own[figure], 1.0, "") for figure in speeds]
    full += [(words.NONE, 0.0, "") for _ in tests] + [(words.NONE, "", "")]
    rows = [{"name": comparison.plan.candidates[0].name, "number": 0, "cells": full}]
    for verdict in judgment.verdicts:
        cells: list[tuple[str, float | str, str]] = [(str(verdict.outcome), str(verdict.outcome), "")]
        cells += [_gain_cell(view.gain(verdict, comparison, context, figure)) for figure in speeds]
        cells += [_test_cell(view.first(verdict.evidence, measure, context)) for measure, _ in tests]
        cells.append((_effective(verdict), -1 if verdict.effective is None else verdict.effective, ""))
        number = view.numbers(comparison)[verdict.deployment]
        rows.append({"name": verdict.deployment, "number": number, "cells": cells})
    return {"heads": heads, "rows": rows}


def _gain_cell(gain: Gain | None) -> tuple[str, float | str, str]:
    if gain is None:
        return (words.NONE, "", "")
    own = words.measured(gain.figure, gain.own.value)
    ends = words.ends(words.ratio, gain.ratio) if gain.ratio.claimed else ""
    return (own, gain.ratio.value, f"{words.ratio(gain.ratio.value)} {ends}".strip())


def _test_cell(test: Evidence | None) -> tuple[str, float | str, str]:
    if test is None:
        return (words.NONE, "", "")
    return (words.loss(test.unit, test.loss.value), view.used(test, test.loss.value), _ends(test))


def _ends(test: Evidence) -> str:
    return words.ends(partial(words.loss, test.unit), test.loss)


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    plan, model = comparison.plan, comparison.model
    margins = plan.margins
    facts = [
        ("model", _pairs(model)),
        ("kernels", "; ".join(f"{name}: {_pairs(how)}" for name, how in comparison.running.items())),
        ("machine", _pairs(comparison.machine)),
        ("versions", _pairs(comparison.versions)),
        ("contexts", ", ".join(length_label(length) for length in plan.contexts)),
        ("loads", "; ".join(load.label for load in plan.loads)),
        ("text", f"{plan.text} (hash {plan.text_hash})" if plan.text else ""),
        ("tasks", ", ".join(plan.tasks)),
        ("own questions", f"{plan.own} (hash {plan.own_hash})" if plan.own else ""),
        ("chat template", "used" if plan.chat else "not used"),
        (
            "margins",
            f"perplexity {words.loss('perplexity', margins.perplexity)}, "
            f"tasks {words.loss('score', margins.score)}, "
            f"log probability {words.loss('logprob', margins.logprob)} per token, "
            f"agreement {words.loss('agreement', margins.agreement)}; "
            f"a gain counts from {margins.speed:.0%} on; "
            f"a length is effective from {margins.effective:.0%} of full's score on",
        ),
        ("confidence", f"{plan.confidence:.0%}"),
        ("seed", str(plan.seed)),
        ("KV memory for what fits", words.size(plan.kv_memory) if plan.kv_memory else ""),
        ("arguments of every server", " ".join(plan.arguments)),
        ("time", f"{words.duration(comparison.spent)} of {words.duration(comparison.budget)}"),
        ("created", comparison.created),
    ]
    return [(name, text) for name, text in facts if text]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    return _pairs(value) if isinstance(value, dict) else str(value)
