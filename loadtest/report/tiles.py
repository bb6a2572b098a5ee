"""A variant's gains and costs at the longest context, one figure each, for the top of the page."""

from __future__ import annotations

import math
from functools import partial

from loadtest.compare.phrases import inverse, measure
from loadtest.compare.types import Comparison, Evidence, Gain, Verdict
from loadtest.report import view, words

_GAINS = {
    "tpot": ("as fast per token", "as long per token", "time per token"),
    "output_rate": ("as many tokens per second", "as long for as many tokens", "tokens per second"),
    "ttft": ("as fast to the first token", "as long to the first token", "time to first token"),
    "bytes": ("smaller KV cache", "as large a KV cache", "KV cache"),
}
"""How a figure that is better, worse or the same is called."""


def tiles(comparison: Comparison, verdict: Verdict) -> list[dict[str, str]]:
    """Each has ``label``, ``value``, ``note`` and ``kind``: gain, cost, same or test."""
    context = comparison.plan.contexts[-1]
    found = [view.speed(verdict, comparison, context)]
    found += [view.gain(verdict, comparison, context, figure) for figure in ("ttft", "bytes")]
    tests = [view.first(verdict.evidence, measure, context) for measure in view.MEASURES]
    parts = [_gain(one) for one in found if one is not None and math.isfinite(one.ratio.value)]
    return parts + [_test(one) for one in tests if one is not None and one.loss.count]


def _gain(one: Gain) -> dict[str, str]:
    better, worse, neither = _GAINS[one.figure]
    own = f"{words.measured(one.figure, one.own.value)}, full {words.measured(one.figure, one.full.value)}"
    if not one.different:
        ends = words.ends(words.ratio, one.ratio)
        why = "the same work" if one.equal_work else f"no difference shown {ends}".strip()
        return {"label": neither, "value": "≈ full", "note": f"{why}; {own}", "kind": "same"}
    gained = one.ratio.value > 1
    label, kind, ratio = (better, "gain", one.ratio) if gained else (worse, "cost", inverse(one.ratio))
    note = f"{words.ends(words.ratio, ratio)}; {own}".removeprefix("; ")
    return {"label": label, "value": words.ratio(ratio.value), "note": note, "kind": kind}


def _test(one: Evidence) -> dict[str, str]:
    show = partial(words.loss, one.unit)
    subject = measure(one.measure)
    label = f"perplexity of the {subject}" if one.unit == "perplexity" else f"lost in {subject}"
    note = f"{words.ends(show, one.loss)}; up to {show(one.margin)} allowed".removeprefix("; ")
    return {"label": label, "value": show(one.loss.value), "note": note, "kind": "test"}
