"""The fields of structures that C++ and Python share, from the headers that define them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

_FIELD = re.compile(r"  (?:const )?(\w+)(\*?) (\w+(?:, \w+)*);")
_NUMBERS = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


def fields(header: Path, structure: str) -> list[tuple[str, Any]]:
    """Names and types of a structure's fields, in order.

    A compiled library is found by the content of its headers, so that it has this very structure.

    Args:
        header: the file.
        structure: its name there.

    Raises:
        ValueError: there is none, or it has a field that is neither an address nor one of these numbers.
    """
    text = re.sub(r" *//.*", "", header.read_text())
    body = re.search(rf"^struct {structure} {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)
    if body is None:
        raise ValueError(f"{header.name} has no structure {structure}")
    found: list[tuple[str, Any]] = []
    for line in body[1].splitlines():
        if not line or "{" in line:  # a function
            continue
        field = _FIELD.fullmatch(line)
        if field is None or not (field[2] or field[1] in _NUMBERS):
            raise ValueError(f"{header.name}: Python can't tell the type of{line} of {structure}")
        kind = ctypes.c_void_p if field[2] else _NUMBERS[field[1]]
        found += [(name, kind) for name in field[3].split(", ")]
    return found
