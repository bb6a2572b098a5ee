"""The sparse patterns under their common name; the option ``pattern`` names one."""

from __future__ import annotations

from collections.abc import Mapping

from attention.patterns.base import Pattern
from attention.patterns.bigbird import BigBird
from attention.patterns.declared import member
from attention.patterns.longformer import Longformer
from attention.patterns.lsh import Lsh
from attention.patterns.oracle import Oracle
from attention.patterns.segment import Segment
from attention.patterns.topk import TopK

PATTERNS: dict[str, type[Pattern]] = {
    pattern.name: pattern for pattern in (Longformer, BigBird, Segment, Lsh, TopK, Oracle)
}


def from_options(options: Mapping[str, str]) -> Pattern:
    """The pattern that ``options["pattern"]`` names, with the other options its own.

    Raises:
        ValueError: there is no such pattern, or an option of it cannot be used.
    """
    name, rest = member(options)
    return PATTERNS[name].from_options(rest)
