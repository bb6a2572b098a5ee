"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(root: Path = _CGROUP) -> int:
    """Cores that the process may run on, as many as its control group's quota is worth at most.

    Args:
        root: where control groups are mounted: version 2's ``cpu.max`` or version 1's ``cpu.cfs_quota_us``.
    """
    cores = len(os.sched_getaffinity(0))
    limit, period = _quota(root)
    return max(1, min(cores, limit // period)) if limit > 0 else cores


def _quota(root: Path) -> tuple[int, int]:
    """Microseconds of processor time and in how many of them; no time where there is no quota."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            limit, period = " ".join((root / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        return (int(limit), int(period)) if limit.lstrip("-").isdecimal() else (0, 1)
    return 0, 1
