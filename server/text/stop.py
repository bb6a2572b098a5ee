"""Finding stop strings in a text that arrives in pieces, in time linear in the text."""

from __future__ import annotations

import bisect
import copy
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


class _Search:
    """How much of one pattern a text ends with, letter by letter (Knuth, Morris and Pratt, 1977).

    Args:
        pattern: what is searched for.

    Attributes:
        pattern: the same.
        spells_marks: it has marks of special tokens.
        length: letters at the end of the text that begin the pattern, as many as can be.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.spells_marks = pattern.translate(_NO_MARKS) != pattern
        self.length = 0
        # Of the pattern's first i letters: how many at their end, not all, begin the pattern too. Found when
        # a text gets that far, since most never do.
        self._borders = [0, 0]

    def feed(self, text: str, *, accept: bool) -> int | None:
        """Takes more text.

        Args:
            text: the next piece.
            accept: stop at the end of the pattern; else it is text like any other.

        Returns:
            The index in ``text`` of the letter that completes the pattern, ``None`` if none does.
        """
        pattern, length, index = self.pattern, self.length, 0
        while index < len(text):
            if not length:
                index = text.find(pattern[0], index)
                if index < 0:
                    break
            while length and pattern[length] != text[index]:
                length = self._border(length)
            length += pattern[length] == text[index]
            if length == len(pattern):
                if accept:
                    return index
                length = self._border(length)
            index += 1
        self.length = length
        return None

    def _border(self, length: int) -> int:
        borders, pattern = self._borders, self.pattern
        while len(borders) <= length:
            last = len(borders) - 1
            border = borders[last]
            while border and pattern[border] != pattern[last]:
                border = borders[border]
            borders.append(border + (pattern[border] == pattern[last]))
        return borders[length]


class StopMatcher:
    """Passes text on until the first stop string.

    The first is the one that is complete first, so the answer does not depend on how the text is cut into
    pieces; of those that end at the same character, the one given first. No character of a stop string that
    ends the text is passed on before it is complete.

    A special token without text does not part text for a pattern that spells none: such a pattern is not
    shown its mark.

    Args:
        stop: the stop strings.
        include: pass on the stop string too.

    Attributes:
        matched: the stop string found, or ``None``.
        held: characters held back, since they may be the beginning of a stop string.
    """

    def __init__(self, stop: StopStrings, *, include: bool = False) -> None:
        self._patterns = stop.patterns
        self._searches = [_Search(pattern) for pattern in stop.patterns]
        self._include = include
        # Text that is held back, and the characters before it, marks included.
        self._buffer = ""
        self._passed = 0
        # Of each mark so far, the characters before it that are no marks; and how many of these there are.
        self._marks: list[int] = []
        self._letters = 0
        self.matched: str | None = None

    @property
    def held(self) -> int:
        """Number of characters held back."""
        return len(self._shown(self._buffer))

    def fork(self) -> StopMatcher:
        """Another one that goes on from here."""
        other = copy.copy(self)
        # Borders are the pattern's, so that copies find them for each other.
        other._searches = [copy.copy(search) for search in self._searches]
        other._marks = list(self._marks)
        return other

    def feed(self, text: str, *, accept: bool = True) -> str:
        """Takes more text and gives what can be passed on; nothing comes after a match.

        Args:
            text: the next piece, or a special token's mark.
            accept: with ``False``, a stop string that is complete within this piece is text like any other.
        """
        if self.matched is not None or not text:
            return ""
        is_mark = ord(text[0]) in _MARKS
        first, found = len(text), None
        for search in self._searches:
            if search.spells_marks or not is_mark:
                end = search.feed(text, accept=accept)
                if end is not None and end < first:
                    first, found = end, search
        buffer = self._buffer + text
        if found is not None:
            start = self._start(found, len(found.pattern), len(self._buffer) + first + 1, first + 1)
            self.matched = self._patterns[found.pattern]
            self._buffer = ""
            return self._shown(buffer[:start]) + (self.matched if self._include else "")
        if is_mark:
            self._marks.append(self._letters)
        else:
            self._letters += len(text)
        keep = min(
            (self._start(search, search.length, len(buffer)) for search in self._searches if search.length),
            default=len(buffer),
        )
        self._buffer = buffer[keep:]
        self._passed += keep
        return self._shown(buffer[:keep])

    def flush(self) -> str:
        """The text held back, when no more comes."""
        text, self._buffer = self._buffer, ""
        return self._shown(text)

    def _shown(self, text: str) -> str:
        return text.translate(_NO_MARKS) if self._marks else text

    def _start(self, search: _Search, length: int, end: int, more_letters: int = 0) -> int:
        """Where in the buffer so many characters that a search has found begin.

        Args:
            search: whose they are.
            length: how many; of a pattern that spells no special token, marks among them not counted.
            end: where they end in the buffer.
            more_letters: characters up to there that ``_letters`` does not count yet.
        """
        if search.spells_marks or not self._marks:
            return end - length
        letter = self._letters + more_letters - length
        return letter + bisect.bisect_right(self._marks, letter) - self._passed
