"""The ``longspan`` application: the server's commands, and those that measure it."""

from __future__ import annotations

from loadtest.cli.compare import compare
from loadtest.cli.distill import distill
from loadtest.cli.load import load
from server.cli.application import application, run
from server.cli.help import PlainCommand

__all__ = ["application", "run"]

application.command(cls=PlainCommand)(load)
application.command(cls=PlainCommand)(distill)
application.command(cls=PlainCommand, context_settings={"allow_extra_args": True})(compare)
