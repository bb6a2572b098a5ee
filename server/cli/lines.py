"""Texts for commands that take several."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from server.cli.shared import fail


def read_texts(given: Sequence[str]) -> list[str]:
    """The texts; ``-`` stands for the lines of standard input that aren't blank."""
    texts = [line for text in given for line in (_read_lines() if text == "-" else [text])]
    if not texts:
        fail("standard input has no text", code=2)
    return texts


def _read_lines() -> list[str]:
    try:
        lines = sys.stdin.buffer.read().decode().splitlines()
    except UnicodeDecodeError as error:
        fail(f"standard input is not UTF-8 text: {error}")
    return [line for line in lines if line.strip()]
