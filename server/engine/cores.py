"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_HIERARCHIES = Path("/sys/fs/cgroup")


def usable_cores(groups: Path = _GROUPS, hierarchies: Path = _HIERARCHIES) -> int:
    """Cores that the process may run on, as many as its control groups' quotas are worth at most.

    Args:
        groups: lines ``NUMBER:CONTROLLERS:PATH``; no controllers means version 2.
        hierarchies: where the groups' files are mounted. A container may see only part of its path there.
    """
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(groups, hierarchies)]))


def _quotas(groups: Path, hierarchies: Path) -> list[int]:
    """Whole cores that the groups and their parents allow, where they set a limit."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    found = []
    files: tuple[str, ...]
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            root, files = hierarchies, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            root, files = hierarchies / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        group = Path(path.lstrip("/"))
        found += [_cores(root / each, files) for each in (group, *group.parents)]
    return [cores for cores in found if cores is not None]


def _cores(group: Path, files: tuple[str, ...]) -> int | None:
    try:
        limit, period = " ".join((group / name).read_text() for name in files).split()
        return int(limit) // int(period) if int(limit) > 0 else None
    except (OSError, ValueError):  # no such group here, or "max": no limit
        return None
