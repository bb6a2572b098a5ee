"""The ``longspan`` command: the server's commands, and those that measure it. Nothing imports this module."""

from __future__ import annotations

from loadtest.cli.compare import compare
from loadtest.cli.load import load
from server.cli import application, main

application.command()(load)
application.command(context_settings={"allow_extra_args": True})(compare)

if __name__ == "__main__":
    main()
