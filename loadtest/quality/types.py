"""What is measured, and on what."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a text is predicted.

    Attributes:
        first: index of the first token that counts.
        count: tokens that count.
        value: exponential of the mean negative log probability of a token.
    """

    first: int
    count: int
    value: float


@dataclass(frozen=True, slots=True)
class Needle:
    """A number hidden in a text, and what the model answered when asked for it.

    Attributes:
        depth: where it stood, as a share of the text.
        key: its digits.
        answer: the model's.
        prompt_tokens: of the whole prompt.
    """

    depth: float
    key: str
    answer: str
    prompt_tokens: int

    @property
    def found(self) -> bool:
        """Whether the answer has these digits and no other number before them."""
        match = re.search(r"\d[\d,]*", self.answer)
        return match is not None and match[0].replace(",", "") == self.key


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """How long an output token takes.

    Attributes:
        context: tokens of the prompt before it.
        seconds: per output token, the median.
    """

    context: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One figure and what it ought to be.

    Attributes:
        test: number of the test that it belongs to.
        what: the figure, in words.
        measured: its value and what it was made from; or why there is none.
        expected: the bound, in words.
        passed: whether it keeps the bound.
    """

    test: int
    what: str
    measured: str
    expected: str
    passed: bool
