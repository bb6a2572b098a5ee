"""Settings from the flags of ``longspan serve``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from server.cli.options import command
from server.settings import Settings


def read_settings(arguments: Sequence[str]) -> Settings:
    """The settings of ``longspan serve`` from these arguments, the environment and its file.

    Raises:
        ValueError: it would refuse them; it has said why on standard error.
    """
    found: list[Settings] = []

    def keep(settings: Settings) -> int:
        found.append(settings)
        return 0

    with contextlib.suppress(SystemExit):
        command(keep)(args=list(arguments), prog_name="longspan serve")
    if not found:
        raise ValueError(f"longspan serve would not take {' '.join(arguments)}")
    return found[0]
