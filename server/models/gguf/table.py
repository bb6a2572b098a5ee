"""The architectures that are read from GGUF files, one row each."""

from __future__ import annotations

from typing import Any

from server.models.gguf import llama_like, others
from server.models.gguf.reading import Reading
from server.models.gguf.row import Row

_ROWS = {**llama_like.ROWS, **others.ROWS}
# Names that stand for several architectures, told apart by what the file says.
_CHOICES = {
    "llama": llama_like.choose_llama,
    "mistral3": llama_like.choose_mistral,
    "olmo2": llama_like.choose_olmo,
}

ARCHITECTURES = tuple(sorted(_ROWS))
"""The architectures' names in files."""


def find_row(reading: Reading) -> Row:
    """The row for a file.

    Raises:
        ValueError: its architecture is none of the table's.
    """
    name = reading.architecture
    choice: Any = _CHOICES.get(name)
    if choice is not None:
        return choice(reading)
    if name not in _ROWS:
        raise ValueError(
            f"its architecture, {name}, is none of those that Longspan reads from GGUF files: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return _ROWS[name]
