"""How right an answer is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from loadtest.tasks.types import Sample

# Where a JSON value can begin and end without being a part of a longer word or number.
_START = re.compile(r"[\[{\"]|(?<![\w.+-])(?:-?\d|true\b|false\b|null\b)")


def score(sample: Sample, predicted: str) -> float:
    """How right an answer is, from 0 to 1; NaN if the sample has no known answer.

    ``all`` is RULER's ``string_match_all`` (Hsieh et al. 2024): an entry is looked for as it stands, case
    ignored, also inside longer words and numbers. Where that is too lenient, ``regex`` can say where the
    answer must end.

    Args:
        sample: what was asked.
        predicted: what was generated.
    """
    if not sample.answer:
        return math.nan
    match sample.match:
        case "all":
            found = [entry.lower() in predicted.lower() for entry in sample.answer]
            return sum(found) / len(found)
        case "regex":
            return float(re.search(sample.answer[0], predicted) is not None)
        case "json":
            wanted = parse_json(sample.answer[0])
            return float(any(_equal(value, wanted) for value in _values(predicted)))


def parse_json(text: str) -> Any:
    """A JSON value, strictly: no NaN and no infinity.

    Raises:
        ValueError: it is not one.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("too many brackets in one another") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _values(text: str) -> Iterator[Any]:
    """Every JSON value in the text, those inside others too."""
    decoder = json.JSONDecoder(parse_constant=_refuse)
    for start in _START.finditer(text):
        try:
            value, end = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        # 5 is not in 5th, nor in 5.x.
        if isinstance(value, (dict, list, str)) or not re.match(r"\w|\.\w", text[end : end + 2]):
            yield value


def _equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, as it is in Python."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
