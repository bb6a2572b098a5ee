"""How far simulated figures are off the measured ones, told apart from noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from loadtest.direct.scale import table
from loadtest.direct.scale.traffic import Figures, Scenario
from loadtest.measuring.statistics import LEAST, mean_interval, to_settle
from loadtest.measuring.types import Interval

BOUND = 0.15
"""Share by which a simulated figure may be off the measured one."""

JUDGED = ("rate", "ttft", "hits")
"""The figures that ``BOUND`` is for. Others are shown too: where the processor time of a step
is off as well, costs were measured wrong, or the machine has changed since."""

_NAMES = {
    "rate": ("tokens/s", ".1f"),
    "ttft": ("TTFT, mean, s", ".3f"),
    "ttft_p50": ("TTFT, p50, s", ".3f"),
    "ttft_p90": ("TTFT, p90, s", ".3f"),
    "hits": ("hits", ".1%"),
    "step": ("processor time of a step, s", ".4f"),
}
_FEW = 0.02  # share of prompt tokens: where no more are found, a ratio of hits says nothing

YES, NO, OPEN = "yes", "no", "can't tell"


class Pair(NamedTuple):
    """Real replicas under a scenario, and simulated ones."""

    measured: Figures
    simulated: Figures


def error(figure: str, pairs: Sequence[Pair]) -> Interval:
    """The mean of a simulated figure over that of the measured one, less 1, and its interval.

    Runs are paired, since both had the same prompts: the interval is that of a ratio of means by its
    residuals (Cochran: Sampling Techniques, 1977, chapter 6), at 95%. The error is infinite where the
    measured mean is 0 and the simulated one is not.

    Args:
        figure: of ``Figures``.
        pairs: of independent runs, at least one.
    """
    real = [float(getattr(pair.measured, figure)) for pair in pairs]
    simulated = [float(getattr(pair.simulated, figure)) for pair in pairs]
    mean = statistics.fmean(real)
    if not mean:
        return Interval(math.inf if any(simulated) else 0.0, count=len(pairs))
    ratio = statistics.fmean(simulated) / mean
    return mean_interval([ratio - 1 + (s - ratio * r) / mean for s, r in zip(simulated, real, strict=True)])


def verdict(off: Interval) -> str:
    """Whether an error is within ``BOUND``: ``YES``, ``NO`` or ``OPEN``."""
    if math.isinf(off.value):
        return NO if off.count >= LEAST else OPEN
    if not (off.excludes(-BOUND) and off.excludes(BOUND)):
        return OPEN
    return YES if abs(off.value) < BOUND else NO


def told(pairs: Sequence[Pair]) -> list[str]:
    """The figures that can be compared: without hits where there are next to none."""
    hits = (statistics.fmean(getattr(pair, side).hits for pair in pairs) for side in Pair._fields)
    some = max(hits) > _FEW
    return [name for name in _NAMES if name != "hits" or some]


def report(found: Sequence[tuple[Scenario, Sequence[Pair]]]) -> bool:
    """Prints a table of all that was found, with measured means and errors, and a sentence.

    Returns:
        Whether all judged figures are within ``BOUND``.
    """
    table.header(
        *("traffic", "replicas", "policy", "runs", "figure"),
        *("measured", "simulated", "error", f"within {BOUND:.0%}"),
    )
    verdicts: list[str] = []
    more = 0
    for scenario, pairs in found:
        count = scenario.replicas
        cells: tuple[object, ...] = (
            *(scenario.traffic, count, scenario.policy if count > 1 else ""),
            len(pairs),
        )
        for name in told(pairs):
            title, form = _NAMES[name]
            off = error(name, pairs)
            real = mean_interval([float(getattr(pair.measured, name)) for pair in pairs])
            simulated = statistics.fmean(getattr(pair.simulated, name) for pair in pairs)
            judged = verdict(off) if name in JUDGED else ""
            if judged:
                verdicts.append(judged)
            if judged == OPEN:
                more = max(more, *(to_settle(off, margin) or 0 for margin in (-BOUND, BOUND)))
            table.line(*cells, title, _words(real, form), f"{simulated:{form}}", _words(off, "+.1%"), judged)
            cells = ("",) * len(cells)
    print(
        f"of {len(verdicts)} figures {verdicts.count(YES)} are within {BOUND:.0%}, {verdicts.count(NO)} are "
        f"not, and {verdicts.count(OPEN)} can't be told from noise"
        + (f"; about {more} more rounds may tell" if more else "")
    )
    return set(verdicts) <= {YES}


def _words(interval: Interval, form: str) -> str:
    if not interval.claimed:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} ({interval.low:{form}} to {interval.high:{form}})"
