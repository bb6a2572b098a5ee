"""A document as bytes and lines, and the places where it may be cut."""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from longspan.reading.types import Passage

# A sentence or a line, with the white space after it.
_ATOM = re.compile(r".+?(?:(?<=[.!?])[ \t]+|\n\s*|\Z)", re.DOTALL)
_MOST_CHARACTERS = 400  # of an atom; a longer one is cut at white space, or anywhere
_PIECE = re.compile(rf".{{1,{_MOST_CHARACTERS}}}(?:\s+|\Z)|.{{1,{_MOST_CHARACTERS}}}", re.DOTALL)
# A heading of Markdown, or a line underlined as in Markdown and reStructuredText.
_HEADING = re.compile(r"^(?:#{1,6} .*|(?=\S)[^\n]+\n([=\-*~^\"'`#+])\1{2,}[ \t\r]*)$", re.MULTILINE)


class Document:
    """A document and the places where it may be cut.

    Args:
        content: UTF-8.

    Attributes:
        bounds: bytes at which a sentence, a line or a part of one begins; the last is the end.

    Raises:
        ValueError: it is not UTF-8, or has no text.
    """

    def __init__(self, content: bytes) -> None:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 text from byte {error.start} on; convert it to UTF-8") from None
        self._begin = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
        if not text.removeprefix("\ufeff").strip():
            raise ValueError("has no text; give a document that has")
        self._content = content
        self._lines = [0, *accumulate(len(line) + 1 for line in content.split(b"\n"))]
        atoms = (piece[0] for atom in _ATOM.finditer(text) for piece in _PIECE.finditer(atom[0]))
        self.bounds: Sequence[int] = [0, *accumulate(len(atom.encode()) for atom in atoms)]
        starts = [0, *(match.start() for match in _HEADING.finditer(text))]
        between = (len(text[a:b].encode()) for a, b in pairwise(starts))
        self._headings = list(accumulate(between))

    def passage(self, start: int, end: int) -> Passage | None:
        """The passage between two bytes, without white space or a byte order mark around it.

        ``None`` where nothing else is.
        """
        start = max(start, self._begin)
        part = self._content[start:end]
        start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
        if start >= end:
            return None
        first, last = (bisect_right(self._lines, byte) for byte in (start, end - 1))
        return Passage(start, end, first, last, self._content[start:end].decode())

    def middle(self, start: int, end: int) -> int:
        """The byte to halve a run at: the bound nearest to its middle, else the character there."""
        half = (start + end) // 2
        inner = self.bounds[bisect_right(self.bounds, start) : bisect_left(self.bounds, end)]
        if inner:
            return min(inner, key=lambda byte: abs(byte - half))
        while half > start + 1 and self._content[half] & 0xC0 == 0x80:
            half -= 1
        return half

    def sections(self) -> list[tuple[int, int]]:
        """Begin and end, in bytes, of what stands between headings, each with its own."""
        cuts = sorted({0, self.bounds[-1], *self._headings})
        return list(pairwise(cuts))
