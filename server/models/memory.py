"""How much memory is free for models and caches."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_GROUPS = Path("/proc/self/cgroup")
_HIERARCHIES = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device | str) -> int:
    """Bytes that can be allocated on ``device`` without evicting anything else.

    On the CPU, the smaller of what the machine has free and what the control group still allows.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # torch keeps what loading and proving gave back, which counts as used
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_cgroup_bytes(_GROUPS, _HIERARCHIES)])


def _cgroup_bytes(groups: Path, hierarchies: Path) -> list[int]:
    """The bytes that this process's control groups and their parents leave, where they set a limit.

    Page cache counts as usage but is given back when needed, so its inactive part is taken off, as
    Kubernetes does.

    Args:
        groups: lines ``NUMBER:CONTROLLERS:PATH``; no controllers means version 2.
        hierarchies: where the groups' files are mounted. A container may see only part of its path there.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    free = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            root, names = hierarchies, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = hierarchies / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = Path(path.lstrip("/"))
        free += [_left(root / each, *names) for each in (group, *group.parents)]
    return [each for each in free if each is not None]


def _left(group: Path, limit: str, usage: str, inactive: str) -> int | None:
    try:
        allowed = int((group / limit).read_text())  # "max" means no limit
        used = int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, allowed - used + int(statistics.get(inactive, 0)))
