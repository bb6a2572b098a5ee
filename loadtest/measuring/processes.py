"""Processor time of processes, from ``/proc``."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
"""Ticks of processor time per second, in ``/proc``."""

_LONGEST_WORD = 40


class Process(NamedTuple):
    """One process at one moment.

    Attributes:
        parent: process id.
        ticks: its processor time, with that of children that it has waited for.
        started: in ticks since the machine started; tells processes of one id apart.
        cpu: on which it ran last.
    """

    parent: int
    ticks: int
    started: int
    cpu: int


def processes(root: Path) -> dict[int, Process]:
    """All processes, by id.

    Args:
        root: ``/proc``.
    """
    found = {}
    for entry in os.scandir(root):
        if entry.name.isdecimal():
            try:
                text = (root / entry.name / "stat").read_text(errors="replace")
            except OSError:  # it has ended meanwhile
                continue
            # The name, in parentheses, may have blanks and parentheses of its own.
            fields = text.rpartition(")")[2].split()
            ticks = sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
            found[int(entry.name)] = Process(int(fields[1]), ticks, int(fields[19]), int(fields[36]))
    return found


def tree(table: Mapping[int, Process], roots: Collection[int]) -> set[int]:
    """The living processes of ``roots``, and all their descendants."""
    found = {pid for pid in roots if pid in table}
    children: dict[int, list[int]] = {}
    for pid, process in table.items():
        children.setdefault(process.parent, []).append(pid)
    left = list(found)
    while left:
        more = [pid for pid in children.get(left.pop(), ()) if pid not in found]
        found.update(more)
        left += more
    return found


def name(pid: int, root: Path) -> str:
    """Which program a process runs: its file and its script or module. Other arguments may be secret."""
    try:
        words = (root / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        if not words[0]:  # of the kernel
            return (root / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return ""
    parts = [os.path.basename(words[0])]
    if words[1:2] == ["-m"]:
        parts += words[1:3]
    elif words[1:] and not words[1].startswith("-") and "=" not in words[1]:
        parts.append(os.path.basename(words[1]))
    return " ".join(part[:_LONGEST_WORD] for part in parts)
