"""A comparison for a terminal of 80 columns or more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from loadtest.columns import Columns, figure
from loadtest.compare.answering import answering
from loadtest.compare.gains import (
    GIBIBYTE,
    deciding_figure,
    gains,
    new_prompts,
    of_memory,
    operators_load,
    under_load,
)
from loadtest.compare.lines import item, lines
from loadtest.compare.phrases import setting, times
from loadtest.compare.types import Comparison, Evidence, Gain, Judgment, Outcome, Verdict
from loadtest.document import cores_of
from loadtest.measuring.types import Interval, Load, length_label

_STYLES = {Outcome.SAFE: "green", Outcome.UNSAFE: "red", Outcome.UNKNOWN: "yellow"}
_MEBIBYTE = 2**20
_HEADS = {"tpot": "TPOT\nms", "output_rate": "tok/s", "ttft": "TTFT\ns"}
_SCALES = {"tpot": 1e3, "output_rate": 1.0, "ttft": 1.0}
_DECIDING = ("tpot", "output_rate")


def table(comparison: Comparison, judgment: Judgment) -> RenderableType:
    """Figures by context, what each variant brings and costs, and what to deploy.

    Below each figure stands its interval; a legend says what the heads mean. Outcomes, which are of a variant
    at all contexts together, stand only in the last grid.

    Args:
        comparison: with the rows.
        judgment: of it.
    """
    plan = comparison.plan
    baseline = gains(comparison, plan.full)
    grids = [_grid(comparison, judgment, baseline, context) for context in plan.contexts]
    grids += [_answering(comparison, judgment, length) for length in (*plan.contexts, *plan.beyond)]
    verdicts = [item(verdict.sentence, _STYLES[verdict.outcome]) for verdict in judgment.verdicts]
    advice = [
        Text(sentence, style="bold" if not at else "")
        for at, sentence in enumerate(judgment.advice.sentences)
    ]
    command = [Text(_lines(judgment.advice.command), style="bold cyan")] if judgment.advice.command else []
    notes = [item(remark, "dim") for remark in judgment.uninformative]
    if notes:
        notes = [Text("\nThese tell nothing of the variants:"), *notes]
    return Group(
        _heading(comparison), *grids, _legend(comparison), *lines(comparison, judgment), Text(), *verdicts,
        *notes, Text(), *advice, *command,
    )  # fmt: skip


def _lines(command: str) -> str:
    """A command that can be copied from a narrow terminal."""
    return "\n  " + command.replace(" --attention-option", " \\\n    --attention-option")


def _heading(comparison: Comparison) -> Text:
    plan, model, machine = comparison.plan, comparison.model, comparison.machine
    where = cores_of(machine)
    if str(model.get("device", "cpu")) != "cpu":
        where = str(model["device"])
    parts = [
        f"{model.get('name', 'model')}, {model.get('dtype', '?')}, KV {model.get('kv_dtype', '?')}",
        where,
        f"text: {plan.text}",
        f"intervals at {setting(plan.confidence)} confidence",
    ]
    return Text("; ".join(parts), style="dim")


def _legend(comparison: Comparison) -> Text:
    """The meaning of the grids' heads."""
    loads = [load for context in comparison.plan.contexts if (load := operators_load(comparison, context))]
    words = {
        "tpot": "TPOT: time per output token",
        "output_rate": "tok/s: output tokens per second of all users",
    }
    shown = dict.fromkeys(name for load in loads for name in _speeds(load)) or ["tpot"]
    memory = comparison.plan.kv_memory
    within = f" that {figure(memory / GIBIBYTE)} GiB of KV cache hold, the same for all" if memory else ""
    parts = [
        *(words[name] for name in shown),
        "x full: how many times better than full attention, paired by round",
        "TTFT: time to first token of new prompts",
        f"KV: cache of one sequence; fit: sequences{within}",
        "perplexity: as a ratio to full's",
        "score: share of right answers, and of how many questions",
        "-: not measured",
    ]
    if comparison.plan.readings:
        parts.append(
            "s per question: from the first question about a context to the last answer, by their number; "
            "n/a: a reading decodes no text, so it has no perplexity"
        )
    return Text("\n" + "; ".join(parts), style="dim")


def _grid(
    comparison: Comparison, judgment: Judgment, baseline: Sequence[Gain], context: int
) -> RenderableType:
    load, new = operators_load(comparison, context), new_prompts(comparison, context)
    figures_ = _speeds(load)
    heads = [
        *(head for name in figures_ for head in (_HEADS[name], "x full")),
        _HEADS["ttft"],
        "KV\nMiB",
        "fit",
        "perplexity\nratio",
        "tasks\nscore",
    ]
    grid = Columns("attention", heads)
    verdicts: Mapping[str, Verdict] = {verdict.deployment: verdict for verdict in judgment.verdicts}
    for candidate in comparison.plan.served:
        verdict = verdicts.get(candidate.name)
        found = verdict.gains if verdict else baseline
        grid.add_row(
            _name(comparison, candidate.name, verdict if context == comparison.plan.contexts[-1] else None),
            *_speed(found, load, figures_, paired=verdict is not None),
            _interval(under_load(found, new, "ttft"), 1.0),
            *_memory(found, context),
            *_quality(judgment, verdict, context),
        )
    title = load.label if load else length_label(context)
    others = [one for one in comparison.plan.loads if one.context == context and one not in (load, new)]
    beside = [_load(comparison, judgment, baseline, one) for one in others if _is_measured(comparison, one)]
    return Group(Text(f"\n{title}", style="bold"), grid, *beside)


def _answering(comparison: Comparison, judgment: Judgment, length: int) -> RenderableType:
    """How attention variants and readings answer questions about one context, beside each other."""
    rows = answering(comparison, length)
    if not rows:
        return Group()
    grid = Columns("reads by", ["score", "of", "s per\nquestion", "perplexity\nratio"])
    verdicts = {verdict.deployment: verdict for verdict in judgment.verdicts}
    last = length == (*comparison.plan.contexts, *comparison.plan.beyond)[-1]
    for one in rows:
        if not one.fits:
            grid.add_row(one.name, Text("does not fit", style="dim"))
            continue
        score = _with_ends(one.score, "{:.2f}".format) if one.score.count else Text("-")
        verdict = verdicts.get(one.name)
        perplexity = Text("n/a", style="dim") if one.reading else _quality(judgment, verdict, length)[0]
        seconds = figure(one.seconds)
        name = _name(comparison, one.name, verdict if last and one.reading else None)
        grid.add_row(name, score, f"{one.score.count:,}", seconds, perplexity)
    return Group(Text(f"\n{length_label(length)}, questions", style="bold"), grid)


def _is_measured(comparison: Comparison, load: Load) -> bool:
    return any(cell.load == load.label and cell.figures for cell in comparison.speed)


def _load(comparison: Comparison, judgment: Judgment, baseline: Sequence[Gain], load: Load) -> RenderableType:
    """Speeds under a load that is not the one that decides."""
    names = _DECIDING if load.cached else tuple(_HEADS)
    grid = Columns("attention", [head for name in names for head in (_HEADS[name], "x full")])
    by_name = {verdict.deployment: verdict.gains for verdict in judgment.verdicts}
    for candidate in comparison.plan.served:
        paired = candidate.name in by_name
        found = by_name.get(candidate.name, baseline)
        grid.add_row(candidate.name, *_speed(found, load, names, paired=paired))
    return Group(Text(f"\n{load.label}", style="bold"), grid)


def _name(comparison: Comparison, name: str, verdict: Verdict | None) -> Text:
    if name in comparison.failed:
        return Text(name).append("\nfailed", style="red")
    if verdict is None:
        return Text(name)
    return Text(name).append(f"\n{verdict.outcome}", style=_STYLES[verdict.outcome])


def _speeds(load: Load | None) -> list[str]:
    """Figures of speed under the operator's load, the one that decides first.

    For one user tokens per second tell nothing that time per token doesn't.
    """
    if load is None:
        return ["tpot"]
    first = deciding_figure(load)
    single_user = load.concurrency == 1 and not load.rate
    return [first] if single_user else [first, *(name for name in _DECIDING if name != first)]


def _speed(gains: Sequence[Gain], load: Load | None, names: Sequence[str], *, paired: bool) -> list[Text]:
    cells = []
    for name in names:
        gain = under_load(gains, load, name)
        cells += [_interval(gain, _SCALES[name]), _times(gain if paired else None)]
    return cells


def _times(gain: Gain | None) -> Text:
    """How many times better than full attention."""
    if gain is None:
        return Text("-")
    if gain.equal_work:
        return Text("same\nwork", style="dim")
    style = "" if not gain.different else "green" if gain.ratio.value > 1 else "red"
    return _with_ends(gain.ratio, times, style)


def _memory(gains: Sequence[Gain], context: int) -> list[Text]:
    held, fits = (of_memory(gains, context, name) for name in ("bytes", "fits"))
    return [
        Text(figure(held.own.value / _MEBIBYTE) if held else "-"),
        Text(f"{fits.own.value:,.0f}" if fits else "-"),
    ]


def _quality(judgment: Judgment, verdict: Verdict | None, context: int) -> list[Text]:
    if verdict is None:
        found = [_test(one, context, "tasks") for one in judgment.verdicts]
        tests = [test for test in found if test and not math.isnan(test.full)]
        most = max(tests, key=lambda test: test.loss.count, default=None)  # a variant may have failed early
        return [Text("1"), Text(f"{most.full:.2f}" if most else "-")]
    text, tasks = _test(verdict, context, "text"), _test(verdict, context, "tasks")
    cells = []
    if text is None or not text.loss.count:
        cells.append(Text("-"))
    else:
        loss = text.loss
        ratio = Interval(1 + loss.value, 1 + loss.low, 1 + loss.high, loss.count)
        cells.append(_with_ends(ratio, lambda value: f"{value:.3f}", _beyond(text)))
    if tasks is None or not tasks.loss.count:
        cells.append(Text("-"))
    else:
        cells.append(Text(f"{tasks.own:.2f}\nof {tasks.loss.count}", style=_beyond(tasks)))
    return cells


def _test(verdict: Verdict, context: int, measure: str) -> Evidence | None:
    """The test of scores or of text; of log probabilities there is a sentence."""
    found = (one for one in verdict.evidence if (one.length, one.measure) == (context, measure))
    return next((one for one in found if one.unit != "logprob"), None)


def _beyond(test: Evidence) -> str:
    return "red" if test.outcome is Outcome.UNSAFE else ""


def _interval(gain: Gain | None, scale: float) -> Text:
    return Text("-") if gain is None else _with_ends(gain.own.scaled(scale), figure)


def _with_ends(interval: Interval, write: Callable[[float], str], style: str = "") -> Text:
    text = Text(write(interval.value), style=style)
    if interval.claimed and interval.low != interval.high:
        text.append(f"\n{write(interval.low)}-{write(interval.high)}", style="dim")
    return text
