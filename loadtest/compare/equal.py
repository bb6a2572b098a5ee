"""Where a variant computes what full attention computes, so that a difference is noise or a fault."""

from __future__ import annotations

from collections.abc import Mapping

from loadtest.compare.types import Comparison
from loadtest.measuring.busy import EqualPair
from loadtest.measuring.types import Load

_PREFILL = ("ttft", "prefill_rate")
# Patterns that read every key before they select, even where they then select all.
_LOOKING = ("lsh", "oracle")


def covers(attention: str, options: Mapping[str, str], tokens: int) -> bool:
    """Every query of a context of so many tokens sees every earlier one.

    Args:
        attention: the backend, as ``--attention`` names it.
        options: those in force, defaults included, as the server reports them.
        tokens: of the context.

    Returns:
        False also for a pattern or options that are not known here.
    """
    if attention == "full":
        return True
    pattern = options.get("pattern") if attention == "sparse" else attention
    try:
        number = {key: int(value) for key, value in options.items() if value.isdecimal()}
        match pattern:
            case "sliding_window" | "lsh":
                return number["window"] + number["sinks"] >= tokens
            case "longformer":
                return number["window"] + number["global_tokens"] >= tokens
            case "segment":
                previous = (tokens - 1) // number["segment"] - 1
                return previous * number["segment"] <= number["sinks"]
            case "bigbird":
                return (tokens - 1) // number["block"] <= number["window_blocks"]
            case "topk" | "oracle":
                return number["budget"] >= tokens
    except KeyError:
        return False
    return False


def sees_all(comparison: Comparison, name: str, tokens: int) -> bool:
    """The candidate, as it runs, sees the whole of a context of so many tokens."""
    attention = comparison.plan.candidate(name).attention
    return covers(attention, _options(comparison, name), tokens)


def equal_work(comparison: Comparison, name: str, load: Load, figure: str) -> bool:
    """A candidate computes for this figure what full attention computes, in the same way.

    Then any difference of the two is the machine's noise. It takes a pattern that covers the context, or a
    prompt that the pattern computes exactly; the same kernel; and the same further arguments of the server.
    The work is never the same where ``lsh`` or ``oracle`` reads all keys to select, or where keys are rotated
    as they are read (``positions=cache``).

    Args:
        comparison: with what the servers reported in ``running``; without it no work counts as equal.
        name: of the candidate.
        load: that is on it.
        figure: ``ttft``, ``tpot``, ``output_rate`` or ``prefill_rate``; memory is never a matter of noise.
    """
    deployment, full = comparison.plan.candidate(name), comparison.plan.candidates[0]
    running, reference = comparison.running.get(name), comparison.running.get(full.name)
    if not running or not reference or running.get("kernel") != reference.get("kernel"):
        return False
    if deployment.others != full.others or figure in ("bytes", "fits"):
        return False
    options = _options(comparison, name)
    if options.get("positions") == "cache":
        return False
    looking = options.get("pattern") in _LOOKING
    if not looking and covers(deployment.attention, options, load.context):
        return True
    # Beside other users' decoding a first token waits for that too.
    single_user = load.concurrency == 1 and not load.rate
    return figure in _PREFILL and single_user and not load.cached and options.get("prefill") == "dense"


def equal_pairs(comparison: Comparison) -> list[EqualPair]:
    """Full attention and each candidate whose whole work is the same, with the label of that load."""
    full, *others = comparison.plan.candidates
    return [
        EqualPair(full.name, other.name, load.label)
        for other in others
        for load in comparison.plan.loads
        if equal_work(comparison, other.name, load, "output_rate")
    ]


def _options(comparison: Comparison, name: str) -> Mapping[str, str]:
    options: Mapping[str, str] = comparison.running.get(name, {}).get("options", {})
    return options
