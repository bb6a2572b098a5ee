"""Numbers in a config that no model has, and with which transformers would take hours or all memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.errors import RefusedError, quoted
from server.models.rope import ropes

# Counts of a config for which transformers makes a list, a table or modules with an entry for each. Other
# numbers, such as those of parameters and of tokens in training, may be of any size.
_COUNTS = re.compile(
    r"^(?!.*(param|tokens)).*(layer|label|dense|expert|head|depth|blocks|group|stage|codebook)"
)
_LARGEST_COUNT = 1_000_000
_LARGEST_FACTOR = 1e6
# Infinite where there is none.
_LIMITS = re.compile(r"limit|max|min|clip")


def check_numbers(file: Path, written: Mapping[str, Any]) -> None:
    """Refuses counts beyond those of any model, and NaN and infinity, before transformers reads the config.

    Args:
        file: the config's, for the sentence.
        written: its content.

    Raises:
        RefusedError: names the first.
    """
    left: list[tuple[str, Any]] = list(written.items())
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((name, each) for each in value)
        elif isinstance(value, float) and not math.isfinite(value) and not _LIMITS.search(name):
            raise RefusedError(
                f"{file} says {name[:80]} {value}, with which nothing can be computed; fetch the model again"
            )
        elif isinstance(value, int) and value > _LARGEST_COUNT and _COUNTS.search(name):
            raise RefusedError(
                f"{file} says {name[:80]} {quoted(value)}, and no model has more than {_LARGEST_COUNT:,}; "
                "fetch the model again"
            )


def check_ropes(config: Any) -> None:
    """Refuses factors that don't stretch rotary positions; transformers only logs a warning.

    Raises:
        RefusedError: names the first.
    """
    for rope in ropes(config):
        factor = rope.get("factor", 1.0)
        number = isinstance(factor, int | float) and math.isfinite(factor)
        if factor is not None and not (number and 0 < factor <= _LARGEST_FACTOR):
            raise RefusedError(
                f"the config's rotary positions have the factor {quoted(factor)}; it must be a number "
                f"above 0 and at most {_LARGEST_FACTOR:,.0f}; fetch the config.json that belongs to the model"
            )
