"""``make growth``: what a token costs as contexts grow longer and streams more, for every backend.

The engine is called directly, and long contexts are placed in its cache instead of computed (see
``loadtest.direct.engine``). Decode steps are timed at each context length with the fewest streams, and with
each number of streams at the shortest context. Each backend has a process of its own, and is measured in
rounds with full attention.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from rich.console import Console

from loadtest.arguments import budget, count
from loadtest.direct.growth import document
from loadtest.direct.growth.measure import NothingToMeasureError, measure
from loadtest.direct.growth.table import table
from loadtest.direct.growth.types import Growth, Plan
from loadtest.document import write

_CONTEXTS = tuple(1024 << n for n in range(7))
_STREAMS = tuple(1 << n for n in range(7))
_BUDGET = 900.0  # seconds
_WIDTH = 200  # of the table where it goes to a file


def main() -> int:
    """Prints the tables; ends with 1 if a backend that ought to work has points without a figure."""
    arguments = _arguments()
    plan = Plan(
        contexts=arguments.contexts,
        streams=arguments.streams,
        steps=arguments.steps,
        rounds=arguments.rounds,
        backends=tuple(arguments.backends),
        budget=arguments.budget,
        arguments=(*(("--model", arguments.model) if arguments.model else ()), *arguments.serve),
    )
    progress = Console(stderr=True)

    def keep(growth: Growth) -> None:
        if arguments.json:
            document.save(growth, arguments.json)

    try:
        growth = measure(plan, lambda words: progress.print(words, style="dim", markup=False), keep)
    except NothingToMeasureError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"; {arguments.json} has what was measured" if arguments.json else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(table(growth))
    if arguments.html or arguments.svg:
        from loadtest.direct.growth.report import drawings, render

        if arguments.html:
            write(render(growth), arguments.html)
        for drawn in drawings(growth) if arguments.svg else []:
            drawn.write(arguments.svg / f"{drawn.key}.svg")
    return 0 if growth.complete else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.direct.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="as for `longspan serve`")
    parser.add_argument(
        "--contexts",
        type=_numbers,
        default=_CONTEXTS,
        metavar="N,...",
        help="tokens; beyond what the model is made for, its positions are stretched. Default: 1024 to 65536",
    )
    parser.add_argument(
        "--streams",
        type=_numbers,
        default=_STREAMS,
        metavar="N,...",
        help="sequences that run at once. Default: 1 to 64",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=(),
        metavar="BACKEND",
        help="like flash or 'sliding_window window=512', beside full. Default: every backend and pattern",
    )
    parser.add_argument(
        "--steps", type=count, default=5, help="timed at each point, twice in a round; default: 5"
    )
    parser.add_argument(
        "--rounds",
        type=count,
        default=12,
        help="of each backend at each point, at most: from 6 on a narrow interval is enough. Default: 12",
    )
    parser.add_argument(
        "--budget",
        type=budget,
        default=_BUDGET,
        metavar="TIME",
        help="for all rounds, like 90s, 5m or 1h30m; each backend has an equal part. Default: 15m",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the result there")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a report with plots there")
    parser.add_argument(
        "--svg",
        metavar="FOLDER",
        type=Path,
        help="draw the plots there, as growth-context.svg and growth-streams.svg",
    )
    parser.add_argument("serve", nargs="*", help="further arguments for `longspan serve`, after --")
    arguments = parser.parse_args()
    if any(word.startswith("--attention") for word in arguments.serve):
        parser.error("give backends by --backends, with their options, like 'sliding_window window=512'")
    if (arguments.html or arguments.svg) and importlib.util.find_spec("jinja2") is None:
        parser.error("--html and --svg need jinja2, which is not installed: pip install 'longspan[load]'")
    if arguments.svg and not arguments.svg.is_dir():
        parser.error(f"--svg: there is no folder {arguments.svg}; make it first")
    return arguments


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(sorted({count(word) for word in words.split(",")}))


if __name__ == "__main__":
    sys.exit(main())
