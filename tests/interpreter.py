"""Triton's interpreter, several times as fast, for processes that do nothing else with Triton."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from triton.runtime import interpreter


def replace_language_once() -> None:
    """Has the interpreter replace the functions of Triton's language once, and not put them back.

    It looks for all of them whenever a program is launched or calls another function, ``tl.max`` too, which
    takes longer than what is computed.
    """
    replace: Callable[[Any], Any] = interpreter._patch_lang
    replaced: dict[int, Any] = {}
    to_keep = SimpleNamespace(restore=lambda: None)

    def once(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in replaced:
            replaced[id(names)] = names
            replace(function)
        return to_keep

    interpreter._patch_lang = once
