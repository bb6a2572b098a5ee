"""``make device``: how near the engine comes to what the device can do, with an 8B Llama of random weights.

One table: decode against the memory's bandwidth, prefill against the matrix rate, 256 streams against
transformers' continuous batching, the server against the engine called directly, and decode steps at 128k
tokens under a window and under top-k against those at 4k. A missed aim is a finding; the exit code is 0
unless something failed to run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from loadtest.direct.device import report
from loadtest.direct.device.bench import bench
from loadtest.direct.device.forms import SMALL, WHOLE
from loadtest.document import plain, save

_SECONDS = 570.0
# Where the table goes to a file.
_WIDTH = 120


def main() -> int:
    """Prints the table and, with ``--json``, writes everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model and short lengths, on any device")
    parser.add_argument(
        "--folder", metavar="DIR", type=Path, help="keep the random model there, and use it if it is there"
    )
    parser.add_argument(
        "--seconds", metavar="N", type=float, default=_SECONDS, help="of the whole run (default %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything that was found there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what was started
    form = SMALL if arguments.small else WHOLE
    try:
        document, ran = bench(form, arguments.folder, arguments.seconds, Console(stderr=True))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    console = Console()
    report.show(document, console if console.is_terminal else Console(width=_WIDTH))
    if arguments.json:
        save(plain(document), arguments.json)
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
