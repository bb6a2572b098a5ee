"""Texts to measure on, the same on every machine."""

from __future__ import annotations

import pydoc_data.topics
import re
from pathlib import Path

# A paragraph of running text: begins at the margin like a sentence, ends like one, and has no tables or code.
_PROSE = re.compile(r"[A-Z][\w\s,.;:'\"()*/\u2010-\u201f-]{150,}\.")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def reference() -> str:
    """The reference manual that comes with Python: several hundred thousand characters, chapters by name."""
    return "\n".join(chapter for _, chapter in sorted(pydoc_data.topics.topics.items()))


def read(file: Path) -> str:
    """The text of a file, as UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no text, or is not UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); convert it") from error
    if not text.strip():
        raise ValueError(f"{file} has no text; name a file with a long one")
    return text


def prose(text: str) -> str:
    """Only the text's running paragraphs, a line each, without repeated ones.

    Raises:
        ValueError: there are none.
    """
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if _PROSE.fullmatch(part))
    paragraphs = dict.fromkeys(found)
    if not paragraphs:
        raise ValueError("the text has no paragraphs of sentences; give one that has")
    return "\n".join(paragraphs)


def sentences(text: str) -> list[str]:
    """The text cut after each full stop, question mark and exclamation mark."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence]
