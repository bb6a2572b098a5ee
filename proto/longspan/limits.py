"""Time limits of calls."""

from __future__ import annotations


def seconds(timeout: float | None) -> float | None:
    """A time limit in seconds; ``None`` is none.

    Raises:
        ValueError: no call could end within it.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is {timeout}; it must be above 0 seconds, or None for no limit")
    return timeout
