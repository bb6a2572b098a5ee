"""Logs: one readable line per record on standard error, nothing of what users write at ``info`` and above."""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def configure_logging(level: str) -> None:
    """Sends the process's records of at least ``level`` (``debug`` to ``error``) to standard error.

    Libraries speak up from ``warning`` on: ``--log-level debug`` shows Longspan and not its dependencies.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("longspan").setLevel(level.upper())
