"""Finding stop strings in a text that arrives in pieces."""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping, Sequence

# Characters that no decoded text has: lone surrogates.
_MARKS = range(0xD800, 0xE000)
_NO_MARKS = dict.fromkeys(_MARKS)


class StopStrings:
    """A request's stop strings, and the special tokens that they spell.

    Special tokens have no text. So that a stop string may spell them, such a token adds a mark to what is
    searched: a character that no text has, and that is never passed on.

    Args:
        given: the stop strings, none of them empty.
        special_tokens: ids of the tokenizer's special tokens, by their spelling.

    Attributes:
        given: as given.
        patterns: what is searched for, in order: the stop strings, and those that spell special tokens with
            marks for these, each with the stop string that it stands for.
        marks: by special token.
        token_ids: special tokens whose spelling is a whole stop string.
    """

    def __init__(self, given: Sequence[str] = (), special_tokens: Mapping[str, int] | None = None) -> None:
        special = special_tokens or {}
        self.given = tuple(given)
        self.patterns = {string: string for string in self.given}
        self.token_ids = frozenset(special[string] for string in self.given if string in special)
        # Joined, since some models have thousands of special tokens; no token spans two by a lone surrogate.
        strings = chr(_MARKS[0]).join(self.given)
        spelled = [token for token in special if token and token in strings]
        mark_of = {token: chr(mark) for token, mark in zip(spelled, _MARKS, strict=False)}
        self.marks = {special[token]: mark for token, mark in mark_of.items()}
        if not mark_of:
            return
        # Of special tokens that begin alike the longest is meant, as when a text is tokenized.
        spelling = re.compile("|".join(map(re.escape, sorted(mark_of, key=len, reverse=True))))
        self.patterns = {}
        for string in self.given:
            self.patterns.setdefault(string, string)
            self.patterns.setdefault(spelling.sub(lambda found: mark_of[found[0]], string), string)


class StopMatcher:
    """Passes text on until the first stop string.

    The first is the one that is complete first, so the answer does not depend on how the text is cut into
    pieces; of those that end at the same character, the one given first. No character of a stop string that
    ends the text is passed on before it is complete.

    Args:
        stop: the stop strings.
        include: pass on the stop string too.

    Attributes:
        matched: the stop string found, or ``None``.
        held: characters held back, since they may be the beginning of a stop string.
    """

    def __init__(self, stop: StopStrings, *, include: bool = False) -> None:
        self._patterns = stop.patterns
        self._marked = bool(stop.marks)
        self._include = include
        self._buffer = ""
        self.matched: str | None = None

    @property
    def held(self) -> int:
        """Number of characters held back."""
        return len(self._shown(self._buffer))

    def feed(self, text: str, *, accept: bool = True) -> str:
        """Takes more text and gives what can be passed on; nothing comes after a match.

        Args:
            text: the next piece, or a special token's mark.
            accept: with ``False``, a stop string that is complete within this piece is text like any other.
        """
        if self.matched is not None or not text:
            return ""
        buffer = self._buffer + text
        found = self._find(buffer) if accept else None
        if found is not None:
            start, pattern = found
            self.matched = self._patterns[pattern]
            self._buffer = ""
            return self._shown(buffer[:start]) + (self.matched if self._include else "")
        keep = self._open_at(buffer)
        self._buffer = buffer[keep:]
        return self._shown(buffer[:keep])

    def flush(self) -> str:
        """The text held back, when no more comes."""
        text, self._buffer = self._buffer, ""
        return self._shown(text)

    def _shown(self, text: str) -> str:
        return text.translate(_NO_MARKS) if self._marked else text

    def _find(self, buffer: str) -> tuple[int, str] | None:
        """Where the pattern that is complete first begins, and which it is."""
        best: tuple[int, int, str] | None = None
        for string in self._patterns:
            text, places = self._view(string, buffer)
            # A string that ended in earlier text was not accepted then, and isn't now.
            seen = bisect.bisect_left(places, len(self._buffer))
            start = text.find(string, max(seen - len(string) + 1, 0))
            if start >= 0 and (best is None or places[start + len(string) - 1] < best[0]):
                best = (places[start + len(string) - 1], places[start], string)
        return None if best is None else best[1:]

    def _open_at(self, buffer: str) -> int:
        """Where the longest tail begins that some stop string could still continue."""
        earliest = len(buffer)
        for string in self._patterns:
            text, places = self._view(string, buffer)
            start = text.find(string[0], max(len(text) - len(string) + 1, 0))
            while start >= 0 and places[start] < earliest:
                if string.startswith(text[start:]):
                    earliest = places[start]
                start = text.find(string[0], start + 1)
        return earliest

    def _view(self, pattern: str, buffer: str) -> tuple[str, Sequence[int]]:
        """Where a pattern is searched, and the places of these characters in the buffer.

        A special token without text does not part text for a pattern that spells none.
        """
        if not self._marked or pattern.translate(_NO_MARKS) != pattern:
            return buffer, range(len(buffer))
        return self._shown(buffer), [i for i, letter in enumerate(buffer) if ord(letter) not in _MARKS]
