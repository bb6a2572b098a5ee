"""``make quality``: what attention patterns do to the default model, in six tests on servers of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from loadtest import texts
from loadtest.quality import checks, report
from loadtest.quality.measurement import Check, run

TESTS: dict[int, Callable[[str], Check]] = {
    1: lambda text: checks.sinks(text, slices=3),
    2: checks.beyond_training,
    3: lambda text: checks.needles_in_noise(keys_per_depth=4),
    4: checks.needles_in_prose,
    5: checks.coverage,
    6: checks.decode_time,
}


def main() -> int:
    """Prints one table; ends with 1 if a figure is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--test",
        type=int,
        action="append",
        choices=TESTS,
        help="run this one only; may be repeated",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="measure on this text, of 12,288 tokens at least; without it, on the prose of Python's manual",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there as well")
    parser.add_argument("serve", nargs="*", help="further arguments for `longspan serve`, after --")
    arguments = parser.parse_args()
    try:
        text = texts.read(arguments.text) if arguments.text else texts.prose(texts.reference())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    wanted = [TESTS[test](text) for test in sorted(set(arguments.test or TESTS))]
    progress = Console(stderr=True)
    outcomes = run(wanted, arguments.serve, lambda name: progress.print(f"measuring {name}", style="dim"))
    Console().print(report.table(outcomes))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(outcomes), indent=1) + "\n", encoding="utf-8")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
