"""Runs clang-tidy over the native sources at levels that between them have nearly all lines; see .clang-tidy.

It brings its own compiler's headers, like immintrin.h; the system's are those that the C++ compiler finds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "attention/kernels/cpu"))  # by themselves: the package imports torch

import compiling  # noqa: E402
import levels  # noqa: E402

TIDY = Path(sys.executable).with_name("clang-tidy")

# Every level but those between these, which add one or two instructions to a lower one's.
LEVELS = ("portable", "x86-64-v3", "amx-bf16", "armv8-dotprod")

# The analyzer takes most of the time, and follows the same calls at every level.
ANALYZED = ("x86-64-v3", "armv8-dotprod")

FLAGS = ("-std=c++17", "-Wall", "-Wextra")
# Paths through the unrolled loops of kernels are too many to follow all.
ANALYZER = ("-Xclang", "-analyzer-config", "-Xclang", "max-nodes=20000")
# native_driver.cpp is told which functions there are.
DRIVER = "-DLONGSPAN_FUNCTIONS=LONGSPAN_FUNCTION(longspan_run)"

FINDING = re.compile(r"^(?=\S+:\d+:\d+: (?:error|warning): )", re.MULTILINE)


class Job(NamedTuple):
    """A source file at a level."""

    source: Path
    level: levels.Level
    analyzed: bool


def main() -> int:
    """Prints what is found; 1 where something is."""
    try:
        includes = [f"-isystem{folder}" for folder in system_headers()]
    except compiling.NativeError as error:
        print(f"clang-tidy needs the headers of a C++ compiler: {error}.", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(lambda job: tidied(job, includes), jobs()))
    # What several levels or sources find is shown once.
    sys.stdout.writelines(dict.fromkeys(part for text in found for part in FINDING.split(text)))
    return 1 if any(found) else 0


def jobs() -> list[Job]:
    """All sources at the levels of this machine's architecture, the longest first."""
    sources = sorted(path for package in ("attention", "server") for path in (ROOT / package).rglob("*.cpp"))
    chosen = [level for level in levels.of_machine() if level.name in LEVELS]
    found = [Job(source, level, level.name in ANALYZED) for source in sources for level in chosen]
    found += [Job(source, chosen[-1], True) for source in sorted((ROOT / "tests").rglob("*.cpp"))]
    return sorted(found, key=lambda job: (not job.analyzed, -job.source.stat().st_size))


def system_headers() -> list[Path]:
    """Where the C++ compiler looks for headers, without its own folder: these are clang-tidy's.

    Raises:
        NativeError: there is no compiler, or it does not say.
    """
    command = compiling.compiler()
    environment = {**os.environ, "LC_ALL": "C"}

    def said(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)

    own = Path(said("-print-file-name=include").stdout.strip()).resolve()
    lines = iter(said("-E", "-x", "c++", "-v", os.devnull).stderr.splitlines())
    for _ in takewhile(lambda line: not line.startswith("#include <...>"), lines):
        pass
    folders = [Path(line.strip()).resolve() for line in takewhile(lambda line: line.startswith(" "), lines)]
    if not folders:
        raise compiling.NativeError(f"{command[0]} does not say where its headers are")
    return [folder for folder in folders if folder not in (own, own.with_name("include-fixed"))]


def tidied(job: Job, includes: list[str]) -> str:
    """What is wrong with a source file at a level; empty: nothing."""
    checks = [] if job.analyzed else ["--checks=-clang-analyzer-*"]
    command = [str(TIDY), "--quiet", *checks, str(job.source), "--"]
    command += [*FLAGS, *job.level.arguments, "-nostdinc++", *includes, *ANALYZER, DRIVER]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0 and not done.stdout:
        return ""
    # Only where nothing was found does stderr say more than how many warnings were not shown.
    return f"{done.stdout or done.stderr}\n"


if __name__ == "__main__":
    sys.exit(main())
