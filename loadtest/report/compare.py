"""A comparison as one HTML page: what to deploy, why, and everything that was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from loadtest.columns import figure
from loadtest.compare import analysis
from loadtest.compare.answering import answering
from loadtest.compare.effective import effective_length
from loadtest.compare.gains import deciding_figure, is_served, operators_load
from loadtest.compare.phrases import FIGURES, effective_words, ends, measure, setting
from loadtest.compare.schema import SCHEMA
from loadtest.compare.types import Comparison, Evidence, Gain, Judgment, Verdict
from loadtest.document import plain
from loadtest.measuring.busy import not_counted
from loadtest.measuring.types import length_label
from loadtest.report import evidence, figures, lengths, needles, page, tradeoff, view, words
from loadtest.report.drawing import Drawing
from loadtest.report.figures import NOTHING, Cell
from loadtest.report.tiles import tiles


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a comparison is.

    Attributes:
        words: the current activity.
        done: share of the whole, 0 to 1.
        left: seconds that it will take at most; NaN where that is not known.
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
) -> str:
    """The page.

    Args:
        comparison: what was measured.
        judgment: of it.
        live: the page asks its server for updates; see ``loadtest.report.live``.
        progress: of a comparison that is still going on, whose page has no document to download yet.
    """
    context, winner = comparison.plan.contexts[-1], _winner(judgment)
    full, document = comparison.plan.full, None
    if progress is None:
        document = {"schema": SCHEMA, **plain(comparison), "judgment": plain(judgment)}
    return page.render(
        "compare.html.j2",
        title=f"Which attention for {comparison.model.get('name', 'this model')}?",
        live=live,
        progress=progress,
        advice=judgment.advice,
        tiles=tiles(comparison, winner) if winner else [],
        warnings=_warnings(comparison, judgment),
        variants=[_variant(comparison, verdict) for verdict in judgment.verdicts],
        context=context,
        busy=comparison.busy,
        load=load.label if (load := operators_load(comparison, context)) else "",
        summary=_summary(comparison, judgment),
        drawings=drawings(comparison, judgment),
        needles=needles.tables(comparison),
        questions=_questions(comparison),
        scale=evidence.scale(),
        lines=evidence.lines(),
        heads=figures.HEADS,
        figures=figures.rows(judgment, view.numbers(comparison)),
        uninformative=judgment.uninformative,
        facts=_facts(comparison),
        full_command=comparison.plan.command(full),
        full_name=full,
        confidence=setting(comparison.plan.confidence),
        json=page.embedded(document),
        json_name="longspan-compare.json" if progress is None else "",
    )


def drawings(comparison: Comparison, judgment: Judgment) -> list[Drawing]:
    """All that the comparison has figures for; without those of speed if the machine was too busy."""
    found = [tradeoff.quality_against_memory(comparison, judgment), lengths.memory(comparison)]
    if not comparison.busy:
        found.insert(0, tradeoff.quality_against_speed(comparison, judgment))
        found += [lengths.speed(comparison, judgment), lengths.first_token(comparison, judgment)]
    return [one for one in found if one is not None]


def render_progress(progress: Progress) -> str:
    """The part of a live page that says how far the comparison is."""
    return page.render_part("progress", progress, True)


def _warnings(comparison: Comparison, judgment: Judgment) -> list[str]:
    """Facts that the advice doesn't say already."""
    found = [comparison.busy]
    found += [f"{name} failed while it was measured: {why}" for name, why in comparison.failed.items()]
    told = " ".join(judgment.advice.sentences).lower()
    return [sentence for sentence in found if sentence and sentence.lower() not in told]


def _winner(judgment: Judgment) -> Verdict | None:
    return next((one for one in judgment.verdicts if one.deployment == judgment.advice.winner), None)


def _variant(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    tests = view.distinct(verdict.evidence)
    return {
        "name": verdict.deployment,
        "number": view.numbers(comparison)[verdict.deployment],
        "badge": view.badge(verdict.outcome),
        "sentence": _without_name(verdict),
        "command": verdict.command,
        "exact": verdict.exact,
        "served": is_served(comparison, verdict.deployment),
        "reading": comparison.plan.candidate(verdict.deployment).is_reading,
        "effective": _effective(verdict),
        "kernel": comparison.running.get(verdict.deployment, {}).get("kernel", ""),
        "deciding": evidence.rows([one for one in tests if one.decides]),
        "others": evidence.rows([one for one in tests if not one.decides]),
    }


def _without_name(verdict: Verdict) -> str:
    """Its sentence where name and outcome stand above it."""
    told = verdict.sentence.removeprefix(f"{verdict.deployment}: {verdict.outcome}: ")
    return told if told == verdict.sentence else told[:1].upper() + told[1:]


def _effective(verdict: Verdict) -> str:
    least, most = verdict.effective_least, verdict.effective_most
    if verdict.effective is None or least is None or most is None:
        return words.NONE
    return effective_words(verdict.effective, least, most)


def _summary(comparison: Comparison, judgment: Judgment) -> dict[str, Any]:
    """The table of the longest context: full attention's own figures, and the others' beside it."""
    context = comparison.plan.contexts[-1]
    load = operators_load(comparison, context)
    # For one user tokens per second tell nothing that time per token doesn't.
    single_user = load is not None and deciding_figure(load) == "tpot"
    speeds = [
        figure
        for figure in FIGURES
        if not (single_user and figure == "output_rate")
        and any(view.gain(verdict, comparison, context, figure) for verdict in judgment.verdicts)
    ]
    tests = [
        test
        for test in view.MEASURES
        if any(view.first(verdict.evidence, test, context) for verdict in judgment.verdicts)
    ]
    heads = ["attention", "outcome", *(FIGURES[figure] for figure in speeds)]
    heads += [f"lost: {measure(test)}" for test in tests] + ["effective length"]
    own = {
        figure: next(
            words.measured(figure, gain.full.value)
            for verdict in judgment.verdicts
            if (gain := view.gain(verdict, comparison, context, figure))
        )
        for figure in speeds
    }
    full: list[Cell] = [("baseline", "", "")]
    full += [(own[figure], 1.0, "") for figure in speeds]
    full += [(words.NONE, 0.0, "") for _ in tests]
    known = effective_length(comparison, comparison.plan.full)
    full.append(
        (effective_words(known.length, known.least, known.most), known.length, "") if known else NOTHING
    )
    rows = [{"name": comparison.plan.full, "number": 0, "cells": full}]
    for verdict in judgment.verdicts:
        cells: list[Cell] = [(str(verdict.outcome), str(verdict.outcome), "")]
        cells += [_gain_cell(view.gain(verdict, comparison, context, figure)) for figure in speeds]
        cells += [_test_cell(view.first(verdict.evidence, test, context)) for test in tests]
        cells.append((_effective(verdict), -1 if verdict.effective is None else verdict.effective, ""))
        number = view.numbers(comparison)[verdict.deployment]
        kind = "winner" if verdict.deployment == judgment.advice.winner else ""
        rows.append({"name": verdict.deployment, "number": number, "cells": cells, "kind": kind})
    return {"heads": heads, "rows": rows}


def _questions(comparison: Comparison) -> dict[str, Any]:
    """Attention variants and readings beside each other: scores, and seconds of a question."""
    rows = []
    for length in (*comparison.plan.contexts, *comparison.plan.beyond):
        for one in answering(comparison, length):
            cells: list[Cell] = [(length_label(length), length, "")]
            if not one.fits:
                cells += [("does not fit", -1.0, ""), NOTHING, NOTHING]
            elif not one.score.count:
                cells += [NOTHING, NOTHING, NOTHING]
            else:
                within = ends(one.score, "{:.2f}".format)
                cells += [
                    (f"{one.score.value:.2f}", one.score.value, within.strip()),
                    (f"{one.score.count:,}", one.score.count, ""),
                    (f"{figure(one.seconds)} s", one.seconds, ""),
                ]
            perplexity = analysis.perplexity(comparison, one.name, length)
            known = NOTHING if math.isnan(perplexity) else (f"{perplexity:.2f}", perplexity, "")
            cells.append(("not applicable", "", "") if one.reading else known)
            rows.append({"name": one.name, "number": view.numbers(comparison)[one.name], "cells": cells})
    heads = ["reads by", "context", "score", "questions", "per question", "perplexity"]
    return {"heads": heads, "rows": rows}


def _gain_cell(gain: Gain | None) -> Cell:
    if gain is None:
        return NOTHING
    own = words.measured(gain.figure, gain.own.value)
    if gain.equal_work:
        return (own, gain.ratio.value, "the same work")
    within = words.ends(words.ratio, gain.ratio) if gain.ratio.claimed else ""
    return (own, gain.ratio.value, f"{words.ratio(gain.ratio.value)} {within}".strip())


def _test_cell(test: Evidence | None) -> Cell:
    if test is None:
        return NOTHING
    show = partial(words.loss, test.unit)
    return (show(test.loss.value), view.used(test).value, words.ends(show, test.loss))


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    plan, model = comparison.plan, comparison.model
    margins, budget = plan.margins, ""
    if comparison.budget:
        budget = f" of {words.duration(comparison.budget)}"
    facts = [
        ("model", words.pairs(model)),
        ("kernels", _kernels(comparison)),
        ("machine", words.pairs(comparison.machine)),
        ("versions", words.pairs(comparison.versions)),
        ("contexts", ", ".join(length_label(length) for length in plan.contexts)),
        ("beyond the model's context", ", ".join(length_label(length) for length in plan.beyond)),
        ("loads", "; ".join(load.label for load in plan.loads)),
        ("measured again", "; ".join(not_counted(comparison.speed))),
        ("text", f"{plan.text} (hash {plan.text_hash[:12]})" if plan.text else ""),
        ("tasks", ", ".join(plan.tasks)),
        ("your own questions", f"{plan.own} (hash {plan.own_hash[:12]})" if plan.own else ""),
        ("chat template", "used" if plan.chat else "not used"),
        (
            "margins",
            f"perplexity {words.loss('perplexity', margins.perplexity)}, "
            f"tasks {words.loss('score', margins.score)}, "
            f"log probability {words.loss('logprob', margins.logprob)} per token, "
            f"agreement {words.loss('agreement', margins.agreement)}; "
            f"a gain counts from {setting(margins.speed)} on; "
            f"a length is effective from {setting(margins.effective)} of full's score on, "
            "in brackets what is sure",
        ),
        ("confidence", setting(plan.confidence)),
        ("seed", str(plan.seed)),
        ("KV memory for what fits", words.size(plan.kv_memory) if plan.kv_memory else ""),
        ("arguments of every server", " ".join(plan.arguments)),
        ("time", words.duration(comparison.spent) + budget),
        ("created", comparison.created),
    ]
    return [(name, text) for name, text in facts if text]


def _kernels(comparison: Comparison) -> str:
    """Each kernel with the candidates that it serves."""
    served: dict[str, list[str]] = {}
    for name, how in comparison.running.items():
        served.setdefault(f"{how.get('kernel', '?')} ({how.get('reason', '')})", []).append(name)
    return "; ".join(f"{kernel}: {', '.join(names)}" for kernel, names in served.items())
