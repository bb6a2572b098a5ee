"""Types of settings that are written as text: amounts of memory, and options of the form KEY=VALUE."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(value: Any) -> Any:
    """``"2GiB"``, ``"512M"`` or a plain number to bytes; other things are left to the type check.

    Raises:
        ValueError: the text is not an amount of memory.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not an amount of memory; write it like 2GiB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_option(value: Any) -> Any:
    """``["window=512", "sinks=4"]`` to a dictionary; a dictionary stays as it is.

    Raises:
        ValueError: an entry is not of the form KEY=VALUE.
    """
    if not isinstance(value, (list, tuple)):
        return value
    options = {}
    for entry in value:
        key, separator, text = str(entry).partition("=")
        if not separator or not key:
            raise ValueError(f"{entry!r} is not of the form KEY=VALUE")
        options[key] = text
    return options


PROTOCOLS = ("vllm", "kserve", "channelz")
"""Names of the services that can be served beside Longspan's own."""


def parse_protocols(value: Any) -> Any:
    """``"vllm, kserve"``, or a list of names, to ``"vllm,kserve"``; other things are left to the type check.

    Raises:
        ValueError: a name is not one of ``PROTOCOLS``.
    """
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    if not isinstance(value, str):
        return value
    names = [name for part in value.split(",") if (name := part.strip())]
    for name in names:
        if name not in PROTOCOLS:
            raise ValueError(f"{name!r} is no protocol here; those are {', '.join(PROTOCOLS)}")
    return ",".join(dict.fromkeys(names))


Protocols = Annotated[str, BeforeValidator(parse_protocols)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Options = Annotated[dict[str, str], BeforeValidator(parse_option)]
# The empty name is none, so that a flag can undo what a file says.
File = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]
