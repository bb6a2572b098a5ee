"""Finding stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until the first stop string.

    The first is the one that is complete first, so the answer does not depend on how the text is cut into
    pieces; of those that end at the same character, the one given first. No character of a stop string that
    ends the text is passed on before it is complete.

    Args:
        strings: the stop strings, none of them empty.
        include: pass on the stop string too.

    Attributes:
        strings: as given.
        matched: the stop string found, or ``None``.
        held: characters held back, since they may be the beginning of a stop string.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self.strings = tuple(strings)
        self._include = include
        self._buffer = ""
        self.matched: str | None = None

    @property
    def held(self) -> int:
        """Number of characters held back."""
        return len(self._buffer)

    def feed(self, text: str, *, accept: bool = True) -> str:
        """Takes more text and gives what can be passed on; nothing comes after a match.

        Args:
            text: the next piece.
            accept: with ``False``, a stop string that is complete within this piece is text like any other.
        """
        if self.matched is not None or not text:
            return ""
        buffer = self._buffer + text
        found = self._find(buffer) if accept else None
        if found is not None:
            start, self.matched = found
            self._buffer = ""
            return buffer[: start + len(self.matched)] if self._include else buffer[:start]
        keep = self._open_at(buffer)
        self._buffer = buffer[keep:]
        return buffer[:keep]

    def flush(self) -> str:
        """The text held back, when no more comes."""
        text, self._buffer = self._buffer, ""
        return text

    def _find(self, buffer: str) -> tuple[int, str] | None:
        """Where the stop string that is complete first begins, and which it is."""
        best: tuple[int, int, str] | None = None
        for string in self.strings:
            # A string that ended in earlier text was not accepted then, and isn't now.
            start = buffer.find(string, max(len(self._buffer) - len(string) + 1, 0))
            if start >= 0 and (best is None or start + len(string) < best[0]):
                best = (start + len(string), start, string)
        return None if best is None else best[1:]

    def _open_at(self, buffer: str) -> int:
        """Where the longest tail begins that some stop string could still continue."""
        earliest = len(buffer)
        for string in self.strings:
            start = buffer.find(string[0], max(len(buffer) - len(string) + 1, 0))
            while 0 <= start < earliest:
                if string.startswith(buffer[start:]):
                    earliest = start
                start = buffer.find(string[0], start + 1)
        return earliest
