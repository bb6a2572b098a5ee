"""The ``longspan`` command."""

import _signal  # type: ignore[import-not-found]  # the C part of signal, which takes milliseconds to import
import os

# As ``server.cli.signals.interrupts_end``, before anything is imported: an exception would come up with a
# traceback of the module that is being imported.
_signal.signal(_signal.SIGINT, lambda *_: os._exit(130))


def main() -> None:
    """Runs the command that the process's arguments name."""
    from loadtest.cli.application import run

    run()


if __name__ == "__main__":
    main()
