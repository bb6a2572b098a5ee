"""Puts a real server under load, faults and hostile inputs; ends with 1 if anything does not hold."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from tests.soak.bounds import Limits
from tests.soak.encoders import ENCODER_KILLED
from tests.soak.report import document, table
from tests.soak.run import Plan, run

_STEP_TIMEOUT = 5.0
# From here on memory can be judged: the last engine serves for long enough.
_JUDGED_MINUTES = 25


def plan_of(minutes: float, seed: int, server: list[str]) -> Plan:
    """The run of so many minutes of the default model, or of what ``server`` names."""
    return Plan(
        seed=seed,
        seconds=60 * minutes,
        window=15 if minutes >= 5 else 7,
        encoders=True,
        per_second=70,
        step_timeout=_STEP_TIMEOUT,
        # Verified drafts change no greedy answer, and what is compared shows it.
        server=["--kv-memory", "256MiB", "--speculate", "ngram", *server],
        limits=Limits(
            answers=3,
            hostile=int(minutes * 100_000 / 30),
            # Wide enough where other programs take the cores while an engine starts; the table says more.
            gap=3.0,
            health=3.0,
            noticed={
                "engine killed": 1.0,
                "engine hangs": _STEP_TIMEOUT + 2.0,
                ENCODER_KILLED: 1.0,
            },
            ready=30.0,
            # A MiB for 10,000 calls would be some 30.
            growth=40.0 if minutes >= _JUDGED_MINUTES else None,
        ),
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load [30]")
    parser.add_argument("--seed", type=int, help="of faults, questions and inputs [drawn]")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/soak"),
        help="for all figures and the server's log [build/soak]",
    )
    parser.add_argument("server", nargs="*", help="after --, further options of longspan serve")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    plan = plan_of(options.minutes, seed, options.server)
    options.folder.mkdir(parents=True, exist_ok=True)
    result = run(plan, options.folder)
    (options.folder / "soak.json").write_text(json.dumps(document(plan, result), indent=1))
    print(table(plan, result))
    for bound in result.bounds:
        if not bound.holds:
            print(f"broken: {bound.name}: {bound.found}, wanted {bound.wanted}", file=sys.stderr)
    return int(not all(bound.holds for bound in result.bounds))


if __name__ == "__main__":
    sys.exit(main())
