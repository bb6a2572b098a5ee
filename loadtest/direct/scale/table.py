"""Tables in Markdown, a cell or a line at a time."""

from __future__ import annotations


def header(*cells: str) -> None:
    """Prints the first line, and the one under it."""
    line(*cells)
    print(f"|{'---|' * len(cells)}", flush=True)


def line(*cells: object) -> None:
    """Prints one line."""
    print("".join(f"| {cell} " for cell in cells) + "|", flush=True)
