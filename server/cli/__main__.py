"""``python -m server.cli``: the commands of the server and its client, without those that measure."""

from server.cli.early import handle_signals

handle_signals()


def main() -> None:
    """Runs the command that the process's arguments name."""
    from server.cli.application import run

    run()


if __name__ == "__main__":
    main()
