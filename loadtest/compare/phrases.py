"""How numbers and lists are written in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from loadtest.measuring.types import Interval, length_label

FIGURES = {
    "tpot": "time per token",
    "output_rate": "tokens per second",
    "ttft": "time to first token",
    "bytes": "KV cache",
    "fits": "sequences that fit",
    "memory_rate": "tokens per second per GiB of KV cache",
}
"""Names of the figures of speed and memory."""


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def ended(sentence: str) -> str:
    """With a full stop."""
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def times(value: float) -> str:
    """A ratio; near 1 with the digits that tell it from 1."""
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}" if 0.99 < value < 1.01 else f"{value:.2f}"


def ends(interval: Interval, write: Callable[[float], str]) -> str:
    """An interval's ends in brackets; nothing where none is claimed or the figure was counted."""
    if not interval.claimed or interval.low == interval.high:
        return ""
    return f" ({write(interval.low)} to {write(interval.high)})"


def amount(unit: str) -> Callable[[float], str]:
    """How a loss or a margin of a unit of ``Evidence`` is written."""
    if unit == "perplexity":
        return lambda value: f"{1 + value:.3f}".removesuffix("0")
    if unit == "score":
        return lambda value: f"{100 * value:.1f}".removesuffix(".0")
    if unit == "agreement":
        return lambda value: f"{value:.1%}".replace(".0%", "%")
    return lambda value: f"{value:.3f}".removesuffix("0")


def setting(share: float) -> str:
    """A share that an operator sets, like a confidence or a margin, with all digits that it has.

    Rounded to whole percents 0.999 were certainty, and a margin of 0.001 none.
    """
    return f"{100 * share:.6g}%"


def measure(name: str) -> str:
    """A test of quality by its name in ``Evidence``."""
    return "your own questions" if name == "own" else name.removeprefix("task:")


def effective_words(length: int, least: int, most: int) -> str:
    """An effective length, and in brackets what is sure of it: nothing more where that is the same.

    Args:
        length: tokens; 0 for none.
        least: what it surely is.
        most: what it may be.
    """
    word, low, high = (length_label(one) if one else "none" for one in (length, least, most))
    if least == length == most:
        return word
    return f"{word} ({low} to {high})"


def inverse(ratio: Interval) -> Interval:
    """How many times worse, of how many times better."""
    return Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low, ratio.count)


def figure(value: float) -> str:
    """Three significant digits."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
