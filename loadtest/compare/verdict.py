"""Which variant to deploy: what is safe, what is fast, and what each loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.compare.measure import NO_CONTEXT, same_tokens
from loadtest.compare.types import Comparison, Row

# Up to this much more perplexity than full attention counts as safe, if no needle is lost.
MOST_PERPLEXITY = 1.05
# A gain below this is the machine's noise.
LEAST_GAIN = 1.05


@dataclass(frozen=True, slots=True)
class Judgment:
    """What a candidate brings and costs, against full attention.

    Attributes:
        candidate: its name.
        safe: nothing was lost that the comparison looks for.
        speedup: of an output token at the longest context.
        memory: how many times less KV cache a sequence holds there.
        gains: in words.
        losses: in words.
    """

    candidate: str
    safe: bool
    speedup: float
    memory: float
    gains: tuple[str, ...]
    losses: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """All of it on a line."""
        return f"{self.candidate}: {', '.join([*self.gains, *self.losses]) or 'no figures'}"


def judge(comparison: Comparison) -> list[Judgment]:
    """Every candidate but full attention itself."""
    base, *others = comparison.plan.candidates
    return [_judge(comparison, other.name, base.name, exact=other.exact) for other in others]


def recommendation(comparison: Comparison) -> list[str]:
    """Which to deploy, and why, a sentence or two; then what may be had by accepting losses."""
    base = comparison.plan.candidates[0].name
    longest = comparison.plan.contexts[-1]
    judged = [judgment for judgment in judge(comparison) if not math.isnan(judgment.speedup)]
    if math.isnan(comparison.row(base, longest).tpot):
        return [f"There is no recommendation: {base} has no figures at {_tokens(longest)}."]
    safe = [judgment for judgment in judged if judgment.safe and judgment.speedup >= LEAST_GAIN]
    lossy = [judgment for judgment in judged if not judgment.safe and judgment.speedup >= LEAST_GAIN]
    sentences = []
    if safe:
        best = max(safe, key=lambda judgment: (judgment.speedup, judgment.memory))
        sentences.append(
            f"Deploy {best.candidate}: at {_tokens(longest)} it is {', '.join(best.gains)}, and nothing was "
            "lost that was looked for: "
            + (", ".join(best.losses) or "perplexity and needles are those of full attention")
            + "."
        )
    else:
        sentences.append(
            f"Deploy {base}: no other variant was faster without losing something on this text up to "
            f"{_tokens(longest)}."
        )
    if lossy:
        fastest = max(lossy, key=lambda judgment: (judgment.speedup, judgment.memory))
        sentences.append(
            f"If your use can bear it, {fastest.candidate} is {', '.join(fastest.gains)}, but: "
            f"{', '.join(fastest.losses)}."
        )
    return sentences


def _judge(comparison: Comparison, name: str, base: str, *, exact: bool) -> Judgment:
    contexts = comparison.plan.contexts
    rows = [(comparison.row(base, context), comparison.row(name, context)) for context in contexts]
    full, own = rows[-1]
    speedup, memory = full.tpot / own.tpot, full.kv_bytes / own.kv_bytes
    gains = []
    for value, words in ((speedup, "per token"), (own.prefill_rate / full.prefill_rate, "in prefill")):
        if value >= LEAST_GAIN:
            gains.append(f"{value:.1f} times faster {words}")
        elif value * LEAST_GAIN <= 1:
            gains.append(f"{1 / value:.1f} times slower {words}")
    if memory >= LEAST_GAIN:
        gains.append(f"{memory:.1f} times less KV")
    losses, harmless = _losses(rows)
    losses += _answers(comparison, name, base)
    errors = [error for _, row in rows for error in row.errors]
    losses += [f"not all could be measured ({error})" for error in errors[:1]]
    measured = all(not math.isnan(row.perplexity) and row.hidden for _, row in rows)
    return Judgment(
        name, exact or (harmless and measured and not errors), speedup, memory, tuple(gains), tuple(losses)
    )


def _losses(rows: Sequence[tuple[Row, Row]]) -> tuple[list[str], bool]:
    """In words, and whether they are within what counts as safe."""
    losses, harmless = [], True
    full, own = max(rows, key=lambda pair: _ratio(pair))
    worst = own.perplexity / full.perplexity
    if not math.isnan(worst):
        losses.append(f"perplexity {worst - 1:+.1%} at {_tokens(own.context)}")
        harmless = worst <= MOST_PERPLEXITY
    for full, own in rows:
        lost = {
            depth: full.found[depth] - own.found.get(depth, 0)
            for depth in full.found
            if own.hidden and own.found.get(depth, 0) < full.found[depth]
        }
        if lost:
            harmless = False
            whole = all(own.found.get(depth, 0) == 0 for depth in lost)
            where = ", ".join(f"{depth:g}" for depth in sorted(lost))
            losses.append(
                f"loses {'every needle' if whole else f'{sum(lost.values())} needles'} at depth {where} "
                f"of {_tokens(own.context)}"
            )
    return losses, harmless


def _ratio(pair: tuple[Row, Row]) -> float:
    ratio = pair[1].perplexity / pair[0].perplexity
    return -math.inf if math.isnan(ratio) else ratio


def _answers(comparison: Comparison, name: str, base: str) -> list[str]:
    ours = comparison.cell(name, NO_CONTEXT, "answers")
    theirs = comparison.cell(base, NO_CONTEXT, "answers")
    if not ours or not theirs or "error" in ours or "error" in theirs:
        return []
    shares = [
        same_tokens(one["tokens"], other["tokens"])
        for one, other in zip(ours["answers"], theirs["answers"], strict=True)
    ]
    same = sum(share == 1.0 for share in shares)
    return [f"{same} of {len(shares)} of your prompts answered word for word as by full attention"]


def _tokens(context: int) -> str:
    return f"{context / 1024:g}k" if context % 512 == 0 else f"{context} tokens"
