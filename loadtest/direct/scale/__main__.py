"""How many replicas: a simulation of the scheduler's own code with costs that are measured here.

It simulates up to 1,000 replicas, on machines like this one, under three routing policies. With
``--validate``, 1, 2 and 4 real replicas share this machine, and are compared with simulated ones that do, in
rounds. Nothing else may run meanwhile.
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
from loadtest.measuring.statistics import LEAST

if TYPE_CHECKING:
    from loadtest.direct.scale.costs import Costs
    from loadtest.measuring.served import Run

_REPLICAS = (1, 4, 16, 64, 250, 1000)
_SERVE = ("--threads", "1", "--kv-memory", "1GiB")


def main() -> int:
    """Prints a table; ends with 1 unless all that is judged is surely within ``errors.BOUND``."""
    arguments = _arguments()
    from loadtest.measuring.served import event_loop
    from loadtest.servers import NotStartedError
    from longspan import LongspanError

    began = time.monotonic()
    try:
        with event_loop() as run:
            costs = _kept(arguments.costs) if arguments.costs else None
            within = (_validate if arguments.validate else _study)(arguments, costs, run)
    except (NotStartedError, LongspanError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if arguments.validate and arguments.json:
            print(f"stopped; --resume goes on with what {arguments.json} has", file=sys.stderr)
        return 130
    print(f"in {time.monotonic() - began:.0f} s")
    return 0 if within else 1


def _validate(arguments: argparse.Namespace, costs: Costs | None, run: Run) -> bool:
    from loadtest.direct.scale.validation import ROWS, Kept, validate

    if costs is not None:
        print(costs)
    kept = Kept.begin((*_SERVE, *arguments.serve), arguments.json, arguments.resume)
    rows = [number - 1 for number in arguments.rows or range(1, len(ROWS) + 1)]
    if max(rows) >= len(ROWS):
        raise ValueError(
            f"--rows {max(rows) + 1}: the validation has rows 1 to {len(ROWS)}; name some of these"
        )
    return validate(kept, arguments.rounds or LEAST, rows, run, costs)


def _study(arguments: argparse.Namespace, costs: Costs | None, run: Run) -> bool:
    from loadtest.direct.scale.calibrate import calibrate
    from loadtest.direct.scale.study import study

    costs = costs or calibrate((*_SERVE, *arguments.serve), run)
    print(costs)
    rows = study(costs, arguments.replicas)
    if arguments.json:
        document.save({"schema": "longspan-scale/1", "costs": costs, "rows": rows}, arguments.json)
    return True


def _kept(path: Path) -> Costs:
    import msgspec

    from loadtest.direct.scale.costs import Costs

    try:
        kept = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return msgspec.convert(kept.get("costs"), Costs)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} has no costs ({error}); give a file that --json wrote") from error


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(sorted({count(word) for word in words.split(",")}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.direct.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--validate", action="store_true", help="compare with real replicas; 7 minutes a round"
    )
    parser.add_argument(
        "--replicas",
        type=_numbers,
        default=_REPLICAS,
        metavar="N,...",
        help="to simulate; default: 1 to 1000",
    )
    parser.add_argument("--rounds", type=count, metavar="N", help=f"of --validate; default: {LEAST}")
    parser.add_argument("--rows", type=_numbers, metavar="N,...", help="of --validate, from 1; default: all")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep costs and figures there")
    parser.add_argument(
        "--resume", action="store_true", help="measure what --json FILE lacks, and judge all that it has then"
    )
    parser.add_argument("--costs", metavar="FILE", type=Path, help="with the costs of such a file")
    parser.add_argument("serve", nargs="*", help="further arguments for `longspan serve`, after --")
    arguments = parser.parse_args()
    if not arguments.validate and (arguments.rounds or arguments.rows or arguments.resume):
        parser.error("--rounds, --rows and --resume are for --validate; give that too")
    if arguments.resume and not arguments.json:
        parser.error("--resume needs the file that has the rounds so far: --json FILE")
    if arguments.json and (refusal := document.refusal(arguments.json)):
        parser.error(refusal)
    if importlib.util.find_spec("simpy") is None:
        parser.error("the simulation needs simpy, which is not installed: pip install 'longspan[dev]'")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
