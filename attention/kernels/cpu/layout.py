"""Whether C++ and Python agree about the structures that they share; see layout.hpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence


class LayoutError(RuntimeError):
    """A library and Python disagree about a structure: every call would read the wrong memory."""


def check(library: ctypes.CDLL, name: str, structures: Sequence[type[ctypes.Structure]]) -> None:
    """Compares sizes and fields with those that the library describes.

    Args:
        library: has ``longspan_layout``.
        name: of its source file, for the message.
        structures: called as in C++, but for a leading underscore.

    Raises:
        LayoutError: something differs, or the library does not know a structure.
    """
    tell = library.longspan_layout
    tell.restype = ctypes.c_char_p
    told = {line.split()[0]: line for line in tell().decode().splitlines()}
    for structure in structures:
        ours = _described(structure)
        called = ours.split()[0]
        theirs = told.get(called, "nothing")
        if ours != theirs:
            raise LayoutError(
                f"{name} and Python disagree about the structure {called}: {_difference(theirs, ours)}; "
                "the files of Longspan are of different versions: install it again"
            )


def _described(structure: type[ctypes.Structure]) -> str:
    words = [structure.__name__.lstrip("_"), str(ctypes.sizeof(structure))]
    for field in structure._fields_:
        place = getattr(structure, field[0])
        words += [field[0], str(place.offset), str(place.size)]
    return " ".join(words)


def _difference(theirs: str, ours: str) -> str:
    """The first field that differs, else the sizes."""
    their_name, *their_words = theirs.split()
    our_words = ours.split()[1:]
    if not their_words:
        return f"there is {their_name} of this name in C++"
    fields = [
        [tuple(words[i : i + 3]) for i in range(1, len(words), 3)] for words in (their_words, our_words)
    ]
    for there, here in zip(*fields, strict=False):
        if there != here:
            return f"in C++ the field {_field(there)}, in Python {_field(here)}"
    return f"{their_words[0]} bytes in C++, {our_words[0]} in Python"


def _field(words: tuple[str, ...]) -> str:
    return f"{words[0]} of {words[2]} bytes at {words[1]}"
