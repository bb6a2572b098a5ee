"""``python -m server.cli``: the commands of the server and its client, without those that measure."""

import _signal  # type: ignore[import-not-found]  # the core of signal, whose import takes milliseconds
import os

# As ``server.cli.signals.interrupts_end``, before anything is imported: an exception would show the
# # traceback of the import that it interrupts.
_signal.signal(_signal.SIGINT, lambda *_: os._exit(130))


def main() -> None:
    """Runs the command that the process's arguments name."""
    from server.cli.application import run

    run()


if __name__ == "__main__":
    main()
