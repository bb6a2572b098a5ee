"""The ``longspan`` command."""

from server.cli.early import handle_signals

handle_signals()


def main() -> None:
    """Runs the command that the process's arguments name."""
    from loadtest.cli.application import run

    run()


if __name__ == "__main__":
    main()
