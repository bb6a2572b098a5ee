"""The exception of every refusal, and how its sentence quotes, below all of the server's packages."""

from __future__ import annotations

_MOST_QUOTED = 80


class RefusedError(Exception):
    """Something about the model, the machine or the settings makes serving impossible.

    The message is a sentence for the operator, with what to do about it. Shown without a traceback.
    """


def quoted(value: object) -> str:
    """A value from a file, as a sentence about it quotes it: its first 80 characters."""
    text = repr(value)
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}..."
