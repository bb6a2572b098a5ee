"""Texts for commands that take several."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from server.cli.shared import fail


def read_texts(given: Sequence[str]) -> list[str]:
    """The texts; ``-`` stands for the lines of standard input."""
    return [line for text in given for line in (_read_lines() if text == "-" else [text])]


def _read_lines() -> list[str]:
    try:
        return sys.stdin.buffer.read().decode().splitlines()
    except UnicodeDecodeError as error:
        fail(f"standard input is not UTF-8 text: {error}")
