"""What a terminal shows of text that a model or a server wrote."""

from __future__ import annotations

from typing import TextIO

# All control characters (C0, DEL, C1) but newline and tab, in JSON's spelling, which holds within JSON too.
_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def shown(text: str, stream: TextIO) -> str:
    """The text for ``stream``: with escaped control characters for a terminal, as it is for all else.

    Terminals obey control characters: text could rename the window, hide lines, or put words into the
    clipboard.
    """
    return text.translate(_ESCAPES) if stream.isatty() else text
