"""HTML documents that need nothing else: templates, with style and script inside."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from loadtest.report import look, words
from loadtest.report.drawing import icon


def _sorts_by(value: float | str) -> float | str:
    """The key that a table sorts a cell by; the script keeps empty ones at the end."""
    return "" if isinstance(value, float) and not math.isfinite(value) else value


_FILTERS: Mapping[str, Callable[..., Any]] = {
    "tokens": words.tokens,
    "duration": words.duration,
    "share": words.share,
    "sorts_by": _sorts_by,
}


def render(template: str, *, live: bool = False, **values: Any) -> str:
    """A page.

    Args:
        template: name of a file in ``templates``.
        live: it asks the server that it came from for updates.
        values: for the template, which escapes them all but drawings.
    """
    style = _asset("style.css").replace("/* LIGHT */", look.variables(look.LIGHT))
    style = style.replace("/* DARK */", look.variables(look.DARK))
    script = _asset("script.js")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shell = {"style": Markup(style), "script": Markup(script), "script_hash": script_hash, "live": live}
    return _environment().get_template(template).render(**shell, **values)


def render_part(macro: str, *arguments: Any) -> str:
    """A part of a page: what a macro of ``parts.html.j2`` makes of these arguments."""
    return str(getattr(_environment().get_template("parts.html.j2").module, macro)(*arguments))


def embedded(document: Any) -> Markup:
    """A document as JSON that is safe inside a ``script`` element, with any strings.

    Args:
        document: as ``loadtest.document.plain`` makes it.
    """
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@cache
def _environment() -> Environment:
    loader = PackageLoader("loadtest.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(_FILTERS)
    environment.globals.update(icon=icon, words=words)
    return environment


@cache
def _asset(name: str) -> str:
    return (files("loadtest.report") / "templates" / name).read_text(encoding="utf-8")
