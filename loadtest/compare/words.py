"""Sentences on one variant: every word follows from the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from loadtest.compare.evidence import PENDING, failures, listed
from loadtest.compare.gains import deciding_figure, new_prompts, operators_load
from loadtest.compare.ground import Ground
from loadtest.compare.types import Comparison, Evidence, Gain, Outcome, Verdict
from loadtest.measuring.types import Interval, length_label
from loadtest.statistics import LEAST

# Tests that a sentence names where there are many.
_NAMED = 2

_GAIN = {
    "tpot": "decodes {} times as fast{}",
    "ttft": "reaches the first token {} times as fast{}",
    "output_rate": "puts out {} times as many tokens per second{}",
    "bytes": "needs {} times less KV cache{}",
    "fits": "fits {} times as many sequences into the same memory{}",
}
_COST = {
    "tpot": "takes {} times as long per token{}",
    "ttft": "takes {} times as long to the first token{}",
    "output_rate": "takes {} times as long for the same tokens{}",
    "bytes": "needs {} times as much KV cache{}",
    "fits": "fits {} times fewer sequences into the same memory{}",
}
FIGURES = {
    "tpot": "time per token",
    "ttft": "time to first token",
    "output_rate": "tokens per second",
    "bytes": "KV cache",
    "fits": "sequences that fit",
}
_DECIDING = (
    ("perplexity", "text"),
    ("score", "tasks"),
    ("logprob", "tasks"),
    ("score", "own"),
    ("agreement", "own"),
)
_SAMPLES = {
    "perplexity": "blocks of text",
    "score": "questions",
    "agreement": "questions",
    "logprob": "contexts",
}


def verdict(comparison: Comparison, judged: Verdict, ground: Ground) -> str:
    """What a variant loses, brings and costs."""
    name = judged.deployment
    if name in comparison.failed:
        return f"{name} failed while it was measured: {ended(comparison.failed[name])}"
    parts = [f"{name}: {judged.outcome}: {_reasons(comparison, judged, ground)}"]
    context = comparison.plan.contexts[-1]
    brings = [gain_words(gain) for gain in claimed(comparison, judged.gains, context) if gain.ratio.value > 1]
    costs = [gain_words(gain) for gain in claimed(comparison, judged.gains, context) if gain.ratio.value < 1]
    if brings:
        parts.append(f"At {length_label(context)} it {listed(brings)}")
    if costs:
        parts.append(f"It costs: at {length_label(context)} it {listed(costs)}")
    return " ".join(map(ended, parts))


def claimed(comparison: Comparison, gains: Iterable[Gain], context: int) -> list[Gain]:
    """What differs for certain from full attention at a context, in the operator's load; memory last.

    On a machine that is too busy nothing is claimed of speeds.
    """
    load, new = operators_load(comparison, context), new_prompts(comparison, context)
    wanted = [("", "bytes"), ("", "fits")]
    if not comparison.busy:
        speeds = [(load.label, deciding_figure(load))] if load else []
        wanted = [*speeds, *([(new.label, "ttft")] if new else []), *wanted]
    at = {(gain.load, gain.figure): gain for gain in gains if gain.context == context}
    return [at[key] for key in wanted if key in at and at[key].different]


def gain_words(gain: Gain) -> str:
    """What it brings or costs, as something that the variant does."""
    better = gain.ratio.value > 1
    ratio = gain.ratio if better else inverse(gain.ratio)
    return (_GAIN if better else _COST)[gain.figure].format(_times(ratio.value), _ends(ratio, _times))


def figure_words(gain: Gain) -> str:
    """A figure with its name, also where it tells nothing."""
    name = FIGURES[gain.figure]
    if gain.equal_work:
        return f"{name}: it computes what full attention computes, so there is nothing to gain"
    if not gain.ratio.claimed:
        return f"{name}: {gain.ratio.count} of the {LEAST} rounds that an interval takes"
    if not gain.different:
        return f"{name}: no difference could be shown{_ends(gain.ratio, _times)[:-1]} times)"
    return f"it {gain_words(gain)}"


def quality(tests: Iterable[Evidence]) -> str:
    """The most that was lost, at the plan's confidence, by deciding tests that are safe."""
    parts = []
    for unit, measure in _DECIDING:
        found = [one for one in tests if (one.unit, one.measure) == (unit, measure) and one.decides]
        if found:
            worst = max(found, key=lambda one: one.loss.high)
            parts.append(_at_most(worst))
    return listed(parts)


def test_words(test: Evidence) -> str:
    """What one test found, with its interval and margin."""
    at = f" at {length_label(test.length)}" if test.length else ""
    if not test.loss.count:
        return f"{_subject(test)}{at}: {PENDING}"
    loss, margin = test.loss, _amount(test.unit)(test.margin)
    ends = f"{_amount(test.unit)(loss.low)} to {_amount(test.unit)(loss.high)}; " if loss.claimed else ""
    where = f", {test.where}" if test.where else ""
    match test.unit:
        case "perplexity":
            said = f"perplexity is {_amount(test.unit)(loss.value)} times full's"
        case "logprob":
            said = f"right answers lose {loss.value:.2f} nats per token in {_subject(test)}"
        case "agreement":
            said = f"{loss.value:.0%} of the tokens of your answers differ from full's"
        case _:
            said = f"{_lost(loss.value)} of 100 points in {_subject(test)}"
    return f"{said}{at} ({ends}margin {margin}){where}"


def more_words(test: Evidence) -> str:
    """How many samples would settle a test; empty if it is settled or none would."""
    return f"about {test.more:,} more {_SAMPLES[test.unit]} would settle it" if test.more else ""


def inverse(ratio: Interval) -> Interval:
    """How many times worse, of how many times better."""
    return Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low, ratio.count)


def ended(sentence: str) -> str:
    """With a full stop."""
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def _reasons(comparison: Comparison, judged: Verdict, ground: Ground) -> str:
    if ground.none:
        return "nothing could be judged"
    tests = judged.evidence
    if judged.outcome is Outcome.UNSAFE:
        worst = _worst([test for test in tests if test.outcome is Outcome.UNSAFE])
        fault = (
            ", though it computes full attention: this is a fault, please report it" if judged.exact else ""
        )
        return "; ".join(map(test_words, worst)) + fault
    if judged.outcome is Outcome.SAFE:
        if judged.exact:
            return "it computes full attention"
        return quality(tests) or "it sees the whole context at these lengths, as full attention does"
    open_tests = [test for test in tests if test.decides and test.outcome is Outcome.UNKNOWN]
    named = sorted(open_tests, key=lambda test: -(test.more or 0))[:_NAMED]
    failed = [
        f"not all could be measured ({reason})" for reason in failures(comparison, judged.deployment)[:1]
    ]
    said = [": ".join(filter(None, (test_words(test), more_words(test) or test.note))) for test in named]
    return "; ".join([*said, *failed]) or PENDING


def _worst(tests: Sequence[Evidence]) -> list[Evidence]:
    """The most telling of what is beyond its margin: together before single, then by how far beyond."""
    single = [test for test in tests if not test.measure.startswith("task:")] or list(tests)
    return sorted(single, key=lambda test: -test.loss.low / test.margin)[:_NAMED]


def _subject(test: Evidence) -> str:
    if test.measure == "own":
        return "your own questions"
    if test.measure == "tasks":
        return "tasks" if test.unit == "score" else "tasks that full attention fails"
    return test.measure.removeprefix("task:")


def _at_most(test: Evidence) -> str:
    high, margin = _amount(test.unit)(test.loss.high), _amount(test.unit)(test.margin)
    match test.unit:
        case "perplexity":
            return f"perplexity at most {high} times full's (margin {margin})"
        case "logprob":
            return f"right answers lose at most {high} nats per token where full fails (margin {margin})"
        case "agreement":
            return f"at most {high} of the tokens of your answers differ (margin {margin})"
    return f"at most {high} of 100 points lost in {_subject(test)} (margin {margin})"


def _lost(value: float) -> str:
    return f"loses {100 * value:.1f}" if value >= 0 else f"wins {-100 * value:.1f}"


def _amount(unit: str) -> Callable[[float], str]:
    """How a loss or margin of a unit is written."""
    if unit == "perplexity":
        return lambda value: f"{1 + value:.3f}".removesuffix("0")
    if unit == "score":
        return lambda value: f"{100 * value:.1f}".removesuffix(".0")
    return (lambda value: f"{value:.0%}") if unit == "agreement" else (lambda value: f"{value:.2f}")


def _times(value: float) -> str:
    """A ratio; near 1 with the digits that tell it from 1."""
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}" if 0.99 < value < 1.01 else f"{value:.2f}"


def _ends(interval: Interval, write: Callable[[float], str]) -> str:
    if not interval.claimed or interval.low == interval.high:
        return ""
    return f" ({write(interval.low)} to {write(interval.high)})"
