"""The image installs what constraints.txt pins, and nothing without a hash but torch."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pins(file: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def needed() -> set[str]:
    """What the server needs on this machine, by what the installed packages say of themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting = [Requirement(each) for each in (*project["dependencies"], *extras["server"], *extras["otel"])]
    found: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        marks = [{"extra": extra} for extra in (*requirement.extras, "")]
        waiting += [
            each
            for each in map(Requirement, distribution(name).requires or ())
            if each.marker is None or any(each.marker.evaluate(mark) for mark in marks)
        ]
    return found


def test_the_lock_has_the_pinned_version_of_all_that_a_server_needs():
    locked, pinned = pins("requirements.lock"), pins("constraints.txt")
    assert locked.items() <= pinned.items(), "run: make lock"
    # CUDA's packages come with torch where that is a build for CUDA.
    lacking = {name for name in needed() - locked.keys() if not name.startswith(("nvidia-", "cuda-"))}
    assert lacking <= {"torch", "triton"}, "run: make lock"


def test_each_package_of_the_lock_has_a_hash():
    entries = re.split(r"\n(?=\w)", (ROOT / "requirements.lock").read_text())[1:]
    assert len(entries) == len(pins("requirements.lock")) > 50
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
