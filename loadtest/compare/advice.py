"""What to deploy, and why."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.compare import words
from loadtest.compare.evidence import listed
from loadtest.compare.gains import deciding_figure, new_prompts, operators_load
from loadtest.compare.ground import Ground
from loadtest.compare.pareto import fronts
from loadtest.compare.types import Advice, Comparison, Evidence, Gain, Outcome, Verdict
from loadtest.measuring.types import Load, length_label

_MEBIBYTE = 2**20


def advise(comparison: Comparison, verdicts: Sequence[Verdict], ground: Ground) -> Advice:
    """The recommendation for the operator's load at the longest context.

    Of the safe variants with a gain that is surely at least ``Margins.speed`` the one that gains most;
    between those whose gains can't be told apart the time to first token decides, then memory. Without
    any, full attention.
    """
    plan = comparison.plan
    speed, memory = fronts(comparison, verdicts)
    winner, sentences = _recommend(comparison, verdicts, ground)
    command = next((one.command for one in plan.candidates if one.name == winner), "")
    return Advice(winner, tuple(map(words.ended, sentences)), command, speed, memory)


def _recommend(comparison: Comparison, verdicts: Sequence[Verdict], ground: Ground) -> tuple[str, list[str]]:
    plan = comparison.plan
    full, load = plan.candidates[0].name, operators_load(comparison, plan.contexts[-1])
    failed = [f"{name} failed while it was measured: {why}" for name, why in comparison.failed.items()]
    if full in comparison.failed:
        return "", [f"There is no recommendation: {failed[0]}", *failed[1:]]
    if ground.none:
        return "", [
            "Nothing could be judged: full attention itself fails all tasks and predicts the text no better "
            "than a guess from how frequent tokens are. Check that the weights are those of a trained model",
            *failed,
        ]
    others = [verdict for verdict in verdicts if verdict.deployment not in comparison.failed]
    if comparison.busy:
        return "", [comparison.busy, "No speed is claimed", _standing(others), *failed]
    if load is None or not _has_speed(comparison, full, load):
        why = "its speed was not measured" if load is None else f"it has no figures of speed at {load.label}"
        return "", [f"There is no recommendation against {full}: {why}", _standing(others), *failed]
    served = [verdict for verdict in others if not _measures_only(comparison, verdict)]
    winners = [verdict for verdict in served if _proven(comparison, verdict, load)]
    if not winners:
        return full, [*_stay(comparison, served, load), *_aside(comparison, others, None), *failed]
    best = _best(comparison, winners, load)
    return best.deployment, [
        *_deploy(comparison, best, load),
        *_aside(comparison, others, best),
        *failed,
    ]


def _has_speed(comparison: Comparison, full: str, load: Load) -> bool:
    return any(
        (cell.deployment, cell.load) == (full, load.label) and cell.figures and not cell.error
        for cell in comparison.speed
    )


def _measures_only(comparison: Comparison, verdict: Verdict) -> bool:
    """The oracle looks at every key to choose the best ones: a measure of others, nothing to be served."""
    plan = comparison.plan
    return any(
        one.name == verdict.deployment and one.options.get("pattern") == "oracle" for one in plan.candidates
    )


def _gain(verdict: Verdict, load: Load | None, figure: str) -> Gain | None:
    label = load.label if load else ""
    return next((one for one in verdict.gains if (one.load, one.figure) == (label, figure)), None)


def _speed(verdict: Verdict, load: Load) -> Gain | None:
    return _gain(verdict, load, deciding_figure(load))


def _proven(comparison: Comparison, verdict: Verdict, load: Load) -> bool:
    gain = _speed(verdict, load)
    least = 1 + comparison.plan.margins.speed
    return verdict.outcome is Outcome.SAFE and gain is not None and gain.different and gain.ratio.low >= least


def _best(comparison: Comparison, winners: Sequence[Verdict], load: Load) -> Verdict:
    gains = {verdict.deployment: _speed(verdict, load) for verdict in winners}
    ratios = {name: gain.ratio for name, gain in gains.items() if gain}
    first = max(ratios.values(), key=lambda ratio: ratio.value)
    tied = [one for one in winners if ratios[one.deployment].high >= first.low]
    new = new_prompts(comparison, load.context)

    def rank(verdict: Verdict) -> tuple[float, float, float]:
        ttft, held = _gain(verdict, new, "ttft"), _memory(verdict, load.context, "bytes")
        first_token = ttft.ratio.value if ttft and ttft.different else 1.0
        return first_token, held.ratio.value if held else 1.0, ratios[verdict.deployment].value

    return max(tied, key=rank)


def _memory(verdict: Verdict, context: int, figure: str) -> Gain | None:
    return next(
        (one for one in verdict.gains if (one.context, one.figure) == (context, figure)),
        None,
    )


def _deploy(comparison: Comparison, best: Verdict, load: Load) -> list[str]:
    context = length_label(load.context)
    gain = _speed(best, load)
    assert gain is not None
    claims = [one for one in words.claimed(comparison, best.gains, load.context) if one is not gain]
    brings = [words.gain_words(one) for one in claims if one.ratio.value > 1]
    costs = [words.gain_words(one) for one in claims if one.ratio.value < 1]
    first = f"Deploy {best.deployment}: at {load.label} it {words.gain_words(gain)} as full attention"
    sentences = [first.replace(" as fast", " as fast", 1)]
    if brings:
        sentences.append(f"At {context} it also {listed(brings)}")
    if costs:
        sentences.append(f"It costs: at {context} it {listed(costs)}")
    return [*sentences, *_growth(comparison, best), _safe(comparison, best), _holds(comparison)]


def _growth(comparison: Comparison, best: Verdict) -> list[str]:
    """Whether its KV cache grows with the context."""
    held = {one.context: one.own.value for one in best.gains if one.figure == "bytes"}
    contexts = sorted(held)
    if len(contexts) < 2 or held[contexts[-1]] < 1.1 * held[contexts[0]]:
        return []
    sizes = [
        f"{held[one] / _MEBIBYTE:,.0f} MiB at {length_label(one)}" for one in (contexts[0], contexts[-1])
    ]
    return [f"Its KV cache grows with the context: {' and '.join(sizes)} per sequence"]


def _safe(comparison: Comparison, best: Verdict) -> str:
    plan = comparison.plan
    lengths = listed([length_label(context) for context in plan.contexts])
    said = words.quality(best.evidence)
    if best.exact:
        return "It computes full attention, so quality is the same by construction"
    if not said:
        return f"It sees the whole context at {lengths}, as full attention does"
    asked = "" if plan.tasks or plan.own else "; no questions were asked"
    return f"It is safe within the margins at {lengths}, at {plan.confidence:.0%} confidence: {said}{asked}"


def _holds(comparison: Comparison) -> str:
    model, machine = comparison.model.get("name", "this model"), comparison.machine.get("cpu", "this machine")
    return (
        f'This holds for {model} on {machine}, the text "{comparison.plan.text}", these lengths and this load'
    )


def _stay(comparison: Comparison, served: Sequence[Verdict], load: Load) -> list[str]:
    full = comparison.plan.candidates[0].name
    reasons = []
    for verdict in served:
        gain = _speed(verdict, load)
        if verdict.outcome is Outcome.UNSAFE:
            reasons.append(f"{verdict.deployment} is not safe")
        elif verdict.outcome is Outcome.UNKNOWN:
            reasons.append(
                f"of {verdict.deployment} there is not enough evidence{_time(comparison, verdict)}"
            )
        else:
            why = words.figure_words(gain) if gain else "its speed was not measured"
            reasons.append(f"{verdict.deployment} is safe, but no gain worth a change is proven: {why}")
    return [
        f"Deploy {full}: at {load.label} no other variant is both safe and proven to be faster by "
        f"{comparison.plan.margins.speed:.0%} or more",
        *(
            words.ended(reason[0].upper() + reason[1:] if reason.startswith("of ") else reason)
            for reason in reasons
        ),
    ]


def _time(comparison: Comparison, verdict: Verdict) -> str:
    """How long all tests of a variant take to be settled, if samples come as fast as before."""
    shares = [_share(test) for test in verdict.evidence if test.decides and test.more]
    if not shares or not comparison.spent:
        return ""
    minutes = max(shares) * comparison.spent / 60
    return f"; about {max(1, round(minutes)):,} more minutes of measuring would settle it" if minutes else ""


def _share(test: Evidence) -> float:
    assert test.more is not None
    return test.more / test.loss.count if test.loss.count else 1.0


def _aside(comparison: Comparison, others: Sequence[Verdict], best: Verdict | None) -> list[str]:
    return []


def _standing(verdicts: Sequence[Verdict]) -> str:
    """Outcomes of quality, which need no quiet machine."""
    parts = []
    for outcome in Outcome:
        names = [verdict.deployment for verdict in verdicts if verdict.outcome is outcome]
        if names:
            parts.append(f"{outcome}: {listed(names)}")
    return f"The verdicts on quality stand: {'; '.join(parts)}" if parts else "No variant was judged"
