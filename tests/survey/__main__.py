"""``python -m tests.survey``: tries architectures and checkpoint forms, and writes docs/models.md."""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version

from tests.survey import table, workers
from tests.survey.outcome import Outcome
from tests.survey.rows import entries
from tests.survey.table import Row


def main() -> None:
    """Tries what the command line names; ends with 1 where something is wrong or crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.survey", description=__doc__)
    parser.add_argument("names", nargs="*", help="rows, or model types with all their variants; else all")
    parser.add_argument("--dry", action="store_true", help="print the outcomes, and leave the page as it is")
    parser.add_argument("--processes", type=int, default=2, help="how many to try at once")
    options = parser.parse_args()
    wanted = set(options.names)
    chosen = [
        name
        for name, entry in entries().items()
        if not wanted or name in wanted or getattr(entry.what, "kind", None) in wanted
    ]
    if not chosen:
        parser.error(f"there is no {', '.join(options.names)}")

    began = time.monotonic()
    found: dict[str, Outcome] = {}

    def tell(name: str, outcome: Outcome) -> None:
        found[name] = outcome
        print(f"{time.monotonic() - began:6.0f} s  {name}: {outcome.verdict}: {outcome.detail}", flush=True)

    try:
        workers.run(chosen, processes=options.processes, tell=tell)
    finally:  # whoever interrupts it keeps what was found
        if not options.dry:
            write(found)
    if any(outcome.verdict in table.BUGS for outcome in found.values()):
        raise SystemExit(1)


def write(found: dict[str, Outcome]) -> None:
    """Writes what was found into the page, beside the rows that were not tried now."""
    versions = {name: version(name) for name in ("transformers", "torch")}
    for section in table.SECTIONS:
        recorded = table.read(section)
        rows = [
            Row(name, entry.more, found[name]) if name in found else recorded[name]
            for name, entry in entries().items()
            if entry.section is section and (name in found or name in recorded)
        ]
        table.write(section, rows, versions)


if __name__ == "__main__":
    main()
