"""The recommendation: which variant to deploy, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loadtest.compare import words
from loadtest.compare.answering import beyond_words
from loadtest.compare.gains import (
    deciding_figure,
    is_served,
    new_prompts,
    of_memory,
    operators_load,
    under_load,
)
from loadtest.compare.ground import Ground
from loadtest.compare.pareto import fronts
from loadtest.compare.phrases import ended, listed, setting, times
from loadtest.compare.selector import selectors
from loadtest.compare.types import Advice, Comparison, Gain, Outcome, Verdict
from loadtest.measuring.types import Load, length_label

_MEBIBYTE = 2**20
_GIBIBYTE = 2**30


def advise(comparison: Comparison, verdicts: Sequence[Verdict], ground: Ground) -> Advice:
    """The recommendation for the operator's load at the longest context.

    It is the safe variant with the largest gain that is surely at least ``Margins.speed``; between gains
    that can't be told apart the time to first token decides, then memory. Without any, it is full
    attention. There is none where nothing could be judged or speeds could not be told apart.
    """
    plan = comparison.plan
    speed, memory = ((), ()) if ground.none else fronts(comparison, verdicts)
    winner, sentences = _recommend(comparison, verdicts, ground)
    failed = [f"{name} failed while it was measured: {why}" for name, why in comparison.failed.items()]
    sentences += beyond_words(comparison)
    command = plan.command(winner) if winner else ""
    return Advice(winner, tuple(map(ended, [*sentences, *failed])), command, speed, memory)


def _recommend(comparison: Comparison, verdicts: Sequence[Verdict], ground: Ground) -> tuple[str, list[str]]:
    plan = comparison.plan
    full, load = plan.full, operators_load(comparison, plan.contexts[-1])
    if full in comparison.failed:
        return "", [f"There is no recommendation, since there is no {full} to hold the others against"]
    if ground.none:
        return "", [
            "Nothing could be judged: full attention itself fails all tasks and predicts the text no better "
            "than a guess from how frequent tokens are. Check that the weights are those of a trained model"
        ]
    others = [verdict for verdict in verdicts if verdict.deployment not in comparison.failed]
    if comparison.busy:
        return "", [comparison.busy[0].upper() + comparison.busy[1:], *_standing(comparison, others)]
    if load is None or not _has_speed(comparison, full, load):
        missing = f"at {load.label}" if load else "at the longest context"
        return "", [
            f"There is no recommendation: {full} has no figures of speed {missing}",
            *_standing(comparison, others),
        ]
    served = [verdict for verdict in others if is_served(comparison, verdict.deployment)]
    winners = [verdict for verdict in served if _proven(comparison, verdict, load)]
    best = _best(comparison, winners, load) if winners else None
    sentences = [
        *(_deploy(comparison, best, load) if best else _stay(comparison, served, load)),
        *_smaller(comparison, served, best, load),
        *_faster(comparison, served, best, load),
        *selectors(comparison, verdicts),
        _holds(comparison, load),
    ]
    return best.deployment if best else full, sentences


def _has_speed(comparison: Comparison, full: str, load: Load) -> bool:
    cells = (cell for cell in comparison.speed if (cell.deployment, cell.load) == (full, load.label))
    return any(cell.figures and not cell.error for cell in cells)


def _speed(verdict: Verdict, load: Load) -> Gain | None:
    return under_load(verdict.gains, load, deciding_figure(load))


def _is_faster(comparison: Comparison, verdict: Verdict, load: Load) -> bool:
    gain = _speed(verdict, load)
    return gain is not None and gain.different and gain.ratio.low >= 1 + comparison.plan.margins.speed


def _proven(comparison: Comparison, verdict: Verdict, load: Load) -> bool:
    return verdict.outcome is Outcome.SAFE and _is_faster(comparison, verdict, load)


def _best(comparison: Comparison, winners: Sequence[Verdict], load: Load) -> Verdict:
    ratios = {one.deployment: gain.ratio for one in winners if (gain := _speed(one, load))}
    first = max(ratios.values(), key=lambda ratio: ratio.value)
    tied = [one for one in winners if ratios[one.deployment].high >= first.low]
    new = new_prompts(comparison, load.context)

    def rank(verdict: Verdict) -> tuple[float, float, float]:
        ttft = under_load(verdict.gains, new, "ttft")
        held = of_memory(verdict.gains, load.context, "bytes")
        first_token = ttft.ratio.value if ttft and ttft.different else 1.0
        return first_token, held.ratio.value if held else 1.0, ratios[verdict.deployment].value

    return max(tied, key=rank)


def _deploy(comparison: Comparison, best: Verdict, load: Load) -> list[str]:
    context, gain = length_label(load.context), _speed(best, load)
    assert gain is not None
    claims = [one for one in words.claimed(comparison, best.gains, load.context) if one is not gain]
    brings = [words.gain_words(one) for one in claims if one.ratio.value > 1]
    costs = [words.gain_words(one) for one in claims if one.ratio.value < 1]
    sentences = [
        f"Deploy {best.deployment}: at {load.label} it {words.gain_words(gain, ' as full attention')}"
    ]
    if brings:
        sentences.append(f"At {context} it also {listed(brings)}")
    if costs:
        sentences.append(f"It costs: at {context} it {listed(costs)}")
    return [
        sentences[0],
        _safe(comparison, best),
        *filter(None, [words.unseen([] if best.exact else best.evidence, comparison.plan.confidence)]),
        *sentences[1:],
        *_growth("Its", {one.context: one.own.value for one in best.gains if one.figure == "bytes"}),
        *_others(comparison, best, load),
    ]


def _others(comparison: Comparison, best: Verdict, load: Load) -> list[str]:
    """Certain gains under loads other than the one that decides."""
    others = [one for one in comparison.plan.loads if one.context == load.context and one != load]
    gains = [_speed(best, other) for other in others]
    return [
        f"At {one.load} it {words.gain_words(one)}" for one in gains if one and words.matters(comparison, one)
    ]


def _growth(whose: str, held: Mapping[int, float]) -> list[str]:
    """Whether a KV cache grows with the context.

    Args:
        whose: in words.
        held: its bytes by context.
    """
    contexts = sorted(held)
    if len(contexts) < 2 or held[contexts[-1]] < 1.1 * held[contexts[0]]:
        return []
    ends = [f"{held[one] / _MEBIBYTE:,.0f} MiB at {length_label(one)}" for one in (contexts[0], contexts[-1])]
    return [f"{whose} KV cache grows with the context: {' and '.join(ends)} per sequence"]


def _safe(comparison: Comparison, best: Verdict) -> str:
    plan = comparison.plan
    if best.exact:
        return "It computes full attention, so it can lose nothing but to rounding"
    lengths, said = listed([length_label(one) for one in plan.contexts]), words.quality(best.evidence)
    if not said:
        return f"It sees the whole context at {lengths}, as full attention does"
    asked = "" if plan.tasks or plan.own else "; no questions were asked"
    return f"It is safe within the margins at {lengths}: {said}{asked}"


def _holds(comparison: Comparison, load: Load | None = None) -> str:
    """The scope of the advice; without a load it covers only quality."""
    plan = comparison.plan
    model, machine = comparison.model.get("name", "this model"), comparison.machine.get("cpu", "this machine")
    lengths = listed([length_label(context) for context in plan.contexts])
    loads = [f'"{one.label}"' for one in plan.loads if load and one.context == load.context]
    under = f" under {listed(loads)} on {machine}" if loads else ""
    return (
        f'This holds for {model} with the text "{plan.text}" at {lengths}{under}, '
        f"at {setting(plan.confidence)} confidence"
    )


def _stay(comparison: Comparison, served: Sequence[Verdict], load: Load) -> list[str]:
    """Why full attention is kept, by reason."""
    full, least = comparison.plan.full, comparison.plan.margins.speed
    sentences = [
        f"Deploy {full}: no other variant is both safe and surely at least {setting(least)} faster at "
        f"{load.label}"
    ]
    # Of those that would be faster there is a sentence each; see ``_faster``.
    unsafe = [
        one.deployment
        for one in served
        if one.outcome is Outcome.UNSAFE and not _is_faster(comparison, one, load)
    ]
    if unsafe:
        sentences.append(f"Not safe: {listed(unsafe)}")
    for one in served:
        if one.outcome is Outcome.UNKNOWN:
            more = words.settling(one.evidence, comparison.spent)
            sentences.append(
                f"{one.deployment}: not enough evidence of its quality{f'; {more}' if more else ''}"
            )
        elif one.outcome is Outcome.SAFE:
            gain = _speed(one, load)
            confidence = comparison.plan.confidence
            why = words.figure_words(gain, confidence) if gain else "its speed was not measured"
            sentences.append(
                f"{one.deployment} is safe, but not surely at least {setting(least)} faster: {why}"
            )
    gains = [gain for one in served for gain in one.gains if gain.figure == "bytes"]
    return [*sentences, *_growth("Full attention's", {gain.context: gain.full.value for gain in gains})]


def _faster(comparison: Comparison, served: Sequence[Verdict], best: Verdict | None, load: Load) -> list[str]:
    """Variants that would gain more, and why they are not recommended."""
    gained = _speed(best, load) if best else None
    least = gained.ratio.value if gained else 1.0
    sentences = []
    for one in served:
        gain = _speed(one, load)
        if gain is None or not _is_faster(comparison, one, load) or gain.ratio.value <= least:
            continue
        if one.outcome is Outcome.UNSAFE:
            sentences.append(f"{one.deployment} {words.gain_words(gain)}, but is not safe")
        elif one.outcome is Outcome.UNKNOWN and best:
            more = words.settling(one.evidence, comparison.spent)
            sentences.append(
                f"{one.deployment} {words.gain_words(gain)}, but there is not enough evidence of its quality"
                f"{f'; {more}' if more else ''}"
            )
    return sentences


def _smaller(
    comparison: Comparison, served: Sequence[Verdict], best: Verdict | None, load: Load
) -> list[str]:
    """How many sequences fit into the same memory: of the winner, and of safe variants that fit more."""
    budget = comparison.plan.kv_memory
    if not budget:
        return []
    fits = {one.deployment: gain for one in served if (gain := of_memory(one.gains, load.context, "fits"))}
    mine = fits.get(best.deployment) if best else None
    least = max(1.0, mine.ratio.value if mine else 1.0)
    more = [
        one.deployment
        for one in served
        if one.outcome is Outcome.SAFE
        and one.deployment in fits
        and fits[one.deployment].ratio.value >= least + comparison.plan.margins.speed
    ]
    where = f"{budget / _GIBIBYTE:.3g} GiB of KV cache holds"
    sentences = [
        f"If memory is what you lack: {name} is safe too, and {where} {gain.own.value:,.0f} sequences of "
        f"{length_label(load.context)}, {times(gain.ratio.value)} times as many as under full attention"
        for name, gain in fits.items()
        if name in more
    ]
    if best and mine and mine.different:
        first = (
            f"{where} {mine.own.value:,.0f} sequences of {length_label(load.context)} under "
            f"{best.deployment}, {mine.full.value:,.0f} under full attention"
        )
        return [first, *sentences]
    return sentences


def _standing(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[str]:
    """Outcomes of quality, which need no quiet machine."""
    if not verdicts:
        return []
    if all(one.outcome is Outcome.UNKNOWN for one in verdicts):
        more = words.settling([test for one in verdicts for test in one.evidence], comparison.spent)
        either = f"There is not enough evidence of any variant's quality either{f'; {more}' if more else ''}"
        return [either, _holds(comparison)]
    parts = [
        f"{outcome}: {listed(names)}"
        for outcome in Outcome
        if (names := [one.deployment for one in verdicts if one.outcome is outcome])
    ]
    return [f"The verdicts on quality stand: {'; '.join(parts)}", _holds(comparison)]
