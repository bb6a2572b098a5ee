"""Panics of the tokenizers library as exceptions like others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class TokenizersError(Exception):
    """The tokenizers library has a bug that a file or text brought out; the message is the library's own."""


def without_panics(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, which raises ``TokenizersError`` where the library panics.

    What the library raises then is no ``Exception``, so that it would pass by all that ends a start with a
    sentence or a call with a status: the call would get no answer, and count as under way for ever.
    """

    @functools.wraps(function)
    def guarded(*arguments: _P.args, **options: _P.kwargs) -> _R:
        try:
            return function(*arguments, **options)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a module that can't be imported
                raise
            raise TokenizersError(f"the tokenizers library failed: {error}") from error

    return guarded
