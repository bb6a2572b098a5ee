"""Sentences on one variant: every word follows from the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from loadtest.compare.answering import seconds_words
from loadtest.compare.evidence import EQUAL, PENDING, failures
from loadtest.compare.gains import deciding_figure, new_prompts, operators_load
from loadtest.compare.ground import Ground
from loadtest.compare.holm import contexts_of
from loadtest.compare.phrases import FIGURES, amount, ended, ends, inverse, listed, measure, times
from loadtest.compare.types import Comparison, Evidence, Gain, Outcome, Verdict
from loadtest.measuring.statistics import least
from loadtest.measuring.types import length_label

# Tests that a sentence names where there are many.
_NAMED = 2

_GAIN = {
    "tpot": "decodes {} times as fast{}{}",
    "ttft": "reaches the first token {} times as fast{}{}",
    "output_rate": "generates {} times as many tokens per second{}{}",
    "bytes": "has a KV cache {} times smaller{}{}",
    "fits": "fits {} times as many sequences into the same memory{}{}",
    "memory_rate": "generates {} times as many tokens per second with each GiB of KV cache{}{}",
}
_COST = {
    "tpot": "takes {} times as long per token{}{}",
    "ttft": "takes {} times as long to the first token{}{}",
    "output_rate": "takes {} times as long for as many tokens{}{}",
    "bytes": "has a KV cache {} times as large{}{}",
    "fits": "fits only {} times as many sequences into the same memory{}{}",
    "memory_rate": "holds {} times as much KV cache for as many tokens per second{}{}",
}
_DECIDING = (
    ("perplexity", "text"),
    ("score", "tasks"),
    ("logprob", "tasks"),
    ("score", "own"),
    ("agreement", "own"),
)
# Agreement measures the share before the first difference: after it two models continue two texts.
_AFTER = "the answers to your questions comes after their first difference from full's"
_SAMPLES = {
    "perplexity": "block{} of text",
    "score": "question{}",
    "agreement": "question{}",
    "logprob": "context{}",
}


def verdict(comparison: Comparison, judged: Verdict, ground: Ground) -> str:
    """A sentence on a variant's losses, gains and costs."""
    name = judged.deployment
    if name in comparison.failed:
        return f"{name} failed while it was measured: {ended(comparison.failed[name])}"
    context = comparison.plan.contexts[-1]
    found = claimed(comparison, judged.gains, context)
    brings = [gain_words(gain) for gain in found if gain.ratio.value > 1]
    costs = [gain_words(gain) for gain in found if gain.ratio.value < 1]
    parts = [f"{name}: {judged.outcome}: {_reasons(comparison, judged, ground)}"]
    if comparison.plan.candidate(name).is_reading:
        parts += filter(None, [seconds_words(comparison, name)])
    if brings:
        parts.append(f"At {length_label(context)} it {listed(brings)}")
    if costs:
        parts.append(f"It costs: at {length_label(context)} it {listed(costs)}")
    return " ".join(map(ended, parts))


def claimed(comparison: Comparison, gains: Iterable[Gain], context: int) -> list[Gain]:
    """Certain differences from full attention at a context: the load's figure, TTFT, KV cache.

    Of speeds only what is worth a change by ``Margins.speed``: with many variants some smaller difference
    looks certain by chance. On a machine that is too busy none.
    """
    load, new = operators_load(comparison, context), new_prompts(comparison, context)
    wanted = [("", "bytes")]
    if not comparison.busy:
        speeds = [(load.label, deciding_figure(load))] if load else []
        wanted = [*speeds, *([(new.label, "ttft")] if new else []), *wanted]
    at = {(gain.load, gain.figure): gain for gain in gains if gain.context == context}
    return [at[key] for key in wanted if key in at and matters(comparison, at[key])]


def matters(comparison: Comparison, gain: Gain) -> bool:
    """A difference that is certain and, if of speed, worth a change."""
    least = 1.0 if gain.figure in ("bytes", "fits") else 1 + comparison.plan.margins.speed
    return gain.different and max(gain.ratio.value, 1 / gain.ratio.value) >= least


def gain_words(gain: Gain, against: str = "") -> str:
    """A gain or a cost as a verb phrase.

    Args:
        gain: a difference from full attention.
        against: words that name full attention, like ``" as full attention"``; none where that is clear.
    """
    better = gain.ratio.value > 1
    ratio = gain.ratio if better or gain.figure == "fits" else inverse(gain.ratio)
    words = _GAIN if better else _COST
    return words[gain.figure].format(times(ratio.value), against, ends(ratio, times))


def figure_words(gain: Gain, confidence: float) -> str:
    """A figure with its name, also where it tells nothing.

    Args:
        gain: of it.
        confidence: of its intervals.
    """
    name = FIGURES[gain.figure]
    if gain.equal_work:
        return f"{name}: it does the same work as full attention, so any difference is the machine's"
    if not gain.ratio.claimed:
        return f"{name}: {gain.ratio.count} rounds were measured, and an interval takes {least(confidence)}"
    if not gain.different:
        between = f"{times(gain.ratio.low)} to {times(gain.ratio.high)} times"
        return f"{name}: no difference could be shown ({between})"
    return f"it {gain_words(gain)}"


def quality(tests: Iterable[Evidence]) -> str:
    """The most that deciding tests, all safe, allow to be lost."""
    deciding = [test for test in tests if test.decides and test.loss.claimed]
    kinds = [
        [test for test in deciding if (test.unit, test.measure) == (unit, measure)]
        for unit, measure in _DECIDING
    ]
    return listed([_at_most(max(kind, key=lambda test: test.loss.high)) for kind in kinds if kind])


def unseen(tests: Iterable[Evidence], confidence: float) -> str:
    """Losses that too few contexts could have missed; empty where no test decides.

    Of k contexts none has a loss that strikes a share s of all contexts with chance (1 - s)^k.

    Args:
        tests: deciding ones among them, all safe.
        confidence: of the verdict, of which one side counts.
    """
    found = [contexts_of(test) for test in tests if test.decides and test.loss.claimed]
    if not found:
        return ""
    share = 1 - ((1 - confidence) / 2) ** (1 / min(found))
    return (
        f"Its tests had {min(found):,} contexts or more: a loss that strikes fewer than "
        f"{math.ceil(100 * share)}% of contexts could have gone unseen"
    )


def test_words(test: Evidence) -> str:
    """The finding of one test, with its interval and margin."""
    at, write, loss = _at(test), amount(test.unit), test.loss
    if not loss.count:
        return f"{_subject(test)}{at}: {PENDING}"
    within = f"{write(loss.low)} to {write(loss.high)}; " if loss.claimed else "no interval yet; "
    match test.unit:
        case "perplexity":
            said = f"perplexity is {write(loss.value)} times full's"
        case "logprob":
            said = f"right answers lose {write(loss.value)} nats per token in {_subject(test)}"
        case "agreement":
            said = f"{write(loss.value)} of {_AFTER}"
        case _:
            verb = "loses" if loss.value >= 0 else "gains"
            said = f"{verb} {100 * abs(loss.value):.1f} of 100 points in {_subject(test)}"
    where = f", {test.where}" if test.where else ""
    return f"{said}{at} ({within}margin {write(test.margin)}){where}"


def more_words(test: Evidence) -> str:
    """How many samples would settle a test; empty if it is settled, or if that is not known yet.

    Where there is no interval yet, its width is not known: only how many samples it takes at least.
    """
    if not test.more or not test.loss.count:
        return ""
    samples = f"{test.more:,} more {_SAMPLES[test.unit].format('s' * (test.more > 1))}"
    if not test.loss.claimed:
        return f"it takes at least {samples}"
    few = ""
    if test.loss.high <= test.margin:
        few = f"{contexts_of(test)} context{'s' * (contexts_of(test) > 1)} can't show it safe; "
    return f"{few}about {samples} would settle it"


def _reasons(comparison: Comparison, judged: Verdict, ground: Ground) -> str:
    if ground.none:
        return "nothing could be judged, since full attention itself only guesses"
    tests = judged.evidence
    if judged.outcome is Outcome.UNSAFE:
        return "; ".join(_broken(judged, test) for test in _worst(tests))
    if judged.outcome is Outcome.SAFE:
        if judged.exact:
            return "it computes full attention"
        return quality(tests) or "it sees the whole context at these lengths, as full attention does"
    open_tests = [test for test in tests if test.decides and test.outcome is Outcome.UNKNOWN]
    found = [test for test in open_tests if test.loss.count]
    named = sorted(found, key=lambda test: -_share(test))[:_NAMED]
    said = ["; ".join(filter(None, (test_words(test), more_words(test)))) for test in named]
    if missing := [f"{_subject(test)}{_at(test)}" for test in open_tests if not test.loss.count]:
        said.append(f"{PENDING}: {listed(missing)}")
    failed = [f"not all could be measured ({why})" for why in failures(comparison, judged.deployment)[:1]]
    return "; ".join([*said, *failed]) or PENDING


def _worst(tests: Iterable[Evidence]) -> list[Evidence]:
    """Tests beyond their margins, the most telling first: all tasks before single ones, then by excess."""
    beyond = [test for test in tests if test.outcome is Outcome.UNSAFE]
    together = [test for test in beyond if not test.measure.startswith("task:")]
    return sorted(together or beyond, key=lambda test: -test.loss.low / test.margin)[:_NAMED]


def _broken(judged: Verdict, test: Evidence) -> str:
    """A loss; where there can be none, also that it is a fault."""
    if judged.exact:
        return f"{test_words(test)}, though it computes full attention: this is a fault, please report it"
    if test.note == EQUAL:
        return f"{test_words(test)}, though it sees the whole context: this is a fault, please report it"
    return test_words(test)


def _share(test: Evidence) -> float:
    """How many times more samples a test needs than it has."""
    return (test.more or 0) / max(test.loss.count, 1)


def _at(test: Evidence) -> str:
    return f" at {length_label(test.length)}" if test.length else ""


def _subject(test: Evidence) -> str:
    if (test.measure, test.unit) == ("tasks", "logprob"):
        return "tasks that full attention fails"
    return measure(test.measure)


def _at_most(test: Evidence) -> str:
    write = amount(test.unit)
    high, margin = write(test.loss.high), write(test.margin)
    match test.unit:
        case "perplexity":
            return f"perplexity at most {high} times full's (margin {margin})"
        case "logprob":
            return f"right answers lose at most {high} nats per token where full fails (margin {margin})"
        case "agreement":
            return f"at most {high} of {_AFTER} (margin {margin})"
    return f"at most {high} of 100 points lost in {_subject(test)} (margin {margin})"


def settling(tests: Sequence[Evidence], seconds: float) -> str:
    """The cost of settling all tests: minutes, if samples come as fast as before, and own questions.

    Minutes bring no more of the operator's own questions, and no more text than there is.

    Args:
        tests: of one variant or of several.
        seconds: that it took to get what there is.
    """
    if any(test.decides and not test.loss.count and test.outcome is Outcome.UNKNOWN for test in tests):
        return "some of it was not measured at all: give a longer --budget"
    unsettled = [test for test in tests if test.decides and test.more]
    if not unsettled or not seconds:
        return ""
    measured = [test for test in unsettled if test.measure != "own"]
    parts = []
    if measured:
        minutes = max(1, round(max(map(_share, measured)) * seconds / 60))
        parts.append(f"{minutes:,} more minute{'s' * (minutes > 1)} of measuring")
    if own := [test.more or 0 for test in unsettled if test.measure == "own"]:
        parts.append(f"{max(own):,} more question{'s' * (max(own) > 1)} of your own")
    text = any(test.unit == "perplexity" for test in measured)
    provided = ", if the text is long enough" if text else ""
    if all(test.loss.claimed for test in unsettled):
        return f"about {' and '.join(parts)} would settle it{provided}"
    return f"it takes at least {' and '.join(parts)}{provided}"
