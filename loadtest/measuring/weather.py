"""Other use of this process's processors during a measurement.

Linux tells it in ``/proc``. Elsewhere nothing is known, and a measurement's weather is NaN.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, Protocol

from loadtest.measuring.processes import TICKS, Process, name, processes, tree
from loadtest.measuring.types import Weather

MOST_OTHER = 0.1
"""Share of all processors' time that others may use. A step on two threads waits for the slower one: a tenth
of two cores, taken from one of them, makes it a fifth longer, several times what a comparison must tell."""

LEAST_TICKS = 6
"""Time of others, in ticks of ``/proc``, below which it counts as none: counters are rounded to ticks."""

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


class Observed(NamedTuple):
    """The machine's other work in a stretch of time.

    Attributes:
        weather: shares; NaN where the system does not tell.
        seconds: processor time that there was, of all processors together.
        busiest: the process that took most without having a part in the measurement, in words; may be empty.
    """

    weather: Weather
    seconds: float
    busiest: str = ""


class Observe(Protocol):
    """Begins to watch; the returned object tells what was observed since."""

    def __call__(self, pids: Collection[int], idle: Collection[int]) -> Callable[[], Observed]:
        """Begins.

        Args:
            pids: processes with a part in the measurement, beside this one; so have all their descendants and
                this one's.
            idle: processes without a part in it although they descend from those, and their descendants.
        """
        ...


def known() -> bool:
    """The system tells what its processors do."""
    return (_PROC / "stat").exists() and hasattr(os, "sched_getaffinity")


UNKNOWN = (
    "this system does not tell what else uses its processors, so disturbed measurements can't be repeated; "
    "end other programs while this one measures"
)
"""The sentence where ``known`` is false."""


def observe(pids: Collection[int] = (), idle: Collection[int] = ()) -> Callable[[], Observed]:
    """See ``Observe``."""
    return Watch(pids, idle).so_far if known() else unseen


def unseen() -> Observed:
    """The observation where nothing could be watched."""
    return Observed(Weather(math.nan, math.nan, math.nan), math.nan)


class Watch:
    """Compares the counters of now with those of when it was made.

    Args:
        pids: see ``Observe``.
        idle: see ``Observe``.
        root: ``/proc``.
        cgroups: where control groups are mounted.
        cores: those that count; by default all that this process may run on.
        clock: in seconds.
    """

    def __init__(
        self,
        pids: Collection[int] = (),
        idle: Collection[int] = (),
        *,
        root: Path = _PROC,
        cgroups: Path = _CGROUPS,
        cores: Collection[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._clock = root, clock
        self._cores = os.sched_getaffinity(0) if cores is None else set(cores)
        self._roots, self._idle = {os.getpid(), *pids}, set(idle)
        self._quotas = _quotas(root, cgroups)
        # Processes before processors here, after them at the end: reading takes time, which is then ours.
        self._table = processes(root)
        self._ours = self._part(self._table)
        self._throttled = [_throttled(path) for path in self._quotas]
        self._busy, self._stolen = _cpu_ticks(root, self._cores)
        self._began = clock()

    def so_far(self) -> Observed:
        """The observation since it began."""
        seconds = (self._clock() - self._began) * len(self._cores)
        if seconds <= 0:
            return Observed(Weather(), 0.0)
        busy, stolen = _cpu_ticks(self._root, self._cores)
        quotas = zip(self._quotas, self._throttled, strict=True)
        throttled = max((_throttled(path) - before for path, before in quotas), default=0.0)
        table = processes(self._root)
        # An orphan has a new parent.
        ours = self._part(table) | {pid for pid in self._ours if _same(pid, self._table, table)}
        own = sum(table[pid].ticks for pid in ours) - sum(self._table[pid].ticks for pid in self._ours)
        weather = Weather(
            stolen=_share((stolen - self._stolen) / TICKS, seconds),
            foreign=_share((busy - self._busy - max(own, 0)) / TICKS, seconds),
            throttled=_share(throttled, seconds),
        )
        return Observed(weather, seconds, self._busiest(table, ours))

    def _part(self, table: dict[int, Process]) -> set[int]:
        return tree(table, self._roots) - tree(table, self._idle)

    def _busiest(self, table: dict[int, Process], ours: set[int]) -> str:
        """Children that have ended count for the process that waited for them, as for ``make``."""
        most, which = 0, 0
        for pid, process in table.items():
            if pid in ours or process.cpu not in self._cores:
                continue
            before = self._table[pid].ticks if _same(pid, self._table, table) else 0
            if process.ticks - before > most:
                most, which = process.ticks - before, pid
        return f"PID {which} {name(which, self._root)}".rstrip() if which else ""


def disturbance(observed: Observed) -> str:
    """Why a measurement during this does not count, a sentence without a full stop; empty if it does."""
    weather = observed.weather
    other = weather.stolen + weather.foreign + weather.throttled
    if not (other > MOST_OTHER and other * observed.seconds * TICKS >= LEAST_TICKS):  # NaN is neither
        return ""
    most = f", most of all {observed.busiest}" if observed.busiest else ""
    parts = {
        f"other processes used {weather.foreign:.0%} of the processor time{most}": weather.foreign,
        f"the hypervisor gave {weather.stolen:.0%} of the processor time to others": weather.stolen,
        f"a CPU quota took {weather.throttled:.0%} of the processor time away": weather.throttled,
    }
    return "; ".join(words for words, share in parts.items() if share > 0.2 * other)


def _same(pid: int, before: dict[int, Process], after: dict[int, Process]) -> bool:
    """The process of this id is the same one."""
    return pid in before and pid in after and before[pid].started == after[pid].started


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole))


def _cpu_ticks(root: Path, cores: Collection[int]) -> tuple[int, int]:
    """Ticks in which processes ran on these cores, and ticks that were stolen from them.

    Time of interrupts belongs to no process, and much of it is that of the measurement's own connections.
    """
    busy = stolen = 0
    wanted = {f"cpu{core}" for core in cores}
    for line in (root / "stat").read_text().splitlines():
        label, *numbers = line.split()
        if label in wanted:
            user, nice, system = (int(number) for number in numbers[:3])
            busy += user + nice + system
            stolen += int(numbers[7]) if len(numbers) > 7 else 0
    return busy, stolen


def _quotas(root: Path, cgroups: Path) -> list[Path]:
    """Files that tell how long this process's control groups were throttled, its own and those around it."""
    try:
        lines = (root / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            tops = [cgroups, cgroups / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [cgroups / controllers, cgroups / "cpu"]
        else:
            continue
        inside = Path(path.lstrip("/"))
        for top in tops:
            files = [top / part / "cpu.stat" for part in (inside, *inside.parents)]
            found += [file for file in files if file.exists()]
    return list(dict.fromkeys(found))


def _throttled(path: Path) -> float:
    """Seconds of processor time; 0 where there is no quota."""
    try:
        counters = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0.0
    if "throttled_usec" in counters:
        return int(counters["throttled_usec"]) / 1e6
    return int(counters.get("throttled_time", 0)) / 1e9
