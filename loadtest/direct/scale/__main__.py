"""How many replicas: a simulation of the scheduler's own code with costs that are measured here.

It simulates up to 1,000 replicas, on machines like this one, under three routing policies. With
``--validate``, 1, 2 and 4 real replicas share this machine, and are compared with simulated ones that do.
Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest import document
from loadtest.arguments import count

if TYPE_CHECKING:
    from loadtest.direct.scale.costs import Costs

_REPLICAS = (1, 4, 16, 64, 250, 1000)
_SERVE = ("--threads", "1", "--kv-memory", "1GiB")


def main() -> int:
    """Prints a table; ends with 1 if a simulated figure is off by more than ``BOUND``."""
    arguments = _arguments()
    from loadtest.direct.scale.calibrate import calibrate
    from loadtest.direct.scale.study import study, validate
    from loadtest.measuring.served import event_loop
    from loadtest.servers import NotStartedError
    from longspan import LongspanError

    serve, began = (*_SERVE, *arguments.serve), time.monotonic()
    try:
        with event_loop() as run:
            costs = _kept(arguments.costs) if arguments.costs else calibrate(serve, run)
            print(costs)
            if arguments.validate:
                rows, within = validate(costs, serve, run)
            else:
                rows, within = study(costs, arguments.replicas), True
    except (NotStartedError, LongspanError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"in {time.monotonic() - began:.0f} s")
    if arguments.json:
        document.save({"schema": "longspan-scale/1", "costs": costs, "rows": rows}, arguments.json)
    return 0 if within else 1


def _kept(path: Path) -> Costs:
    import msgspec

    from loadtest.direct.scale.costs import Costs

    try:
        kept = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return msgspec.convert(kept.get("costs"), Costs)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} has no costs ({error}); give a file that --json wrote") from error


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.direct.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--validate", action="store_true", help="compare with real replicas; 7 minutes")
    parser.add_argument(
        "--replicas",
        type=lambda words: tuple(sorted({count(word) for word in words.split(",")})),
        default=_REPLICAS,
        metavar="N,...",
        help="to simulate; default: 1 to 1000",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep costs and figures there")
    parser.add_argument("--costs", metavar="FILE", type=Path, help="with the costs of such a file")
    parser.add_argument("serve", nargs="*", help="further arguments for `longspan serve`, after --")
    arguments = parser.parse_args()
    if importlib.util.find_spec("simpy") is None:
        parser.error("the simulation needs simpy, which is not installed: pip install 'longspan[dev]'")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
