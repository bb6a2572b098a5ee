"""``longspan compare``: which attention variant should be deployed?"""

from __future__ import annotations

from server.cli_shared import fail


def compare() -> None:
    """Compare attention variants on your model, this machine and your text, and say which to deploy."""
    fail("being rebuilt")
