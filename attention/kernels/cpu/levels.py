"""Named levels of native code: which instructions of the processor it is compiled for.

The x86-64 levels are those of its psABI (x86-64-v3, x86-64-v4), and some with further instructions for
products of integers or bfloat16. Imports only the standard library: the build of the wheel reads this file
before anything is installed.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from typing import NamedTuple

AUTO = "auto"


class LevelError(ValueError):
    """The level is unknown or beyond the processor; the message is a sentence without its full stop."""


class Level(NamedTuple):
    """The instructions that native code may use.

    Attributes:
        name: of the level.
        machine: the architecture, as ``platform.machine`` names it; empty: any.
        features: those that the processor must have, as Linux names them in /proc/cpuinfo.
        arguments: of the compiler, GCC's and Clang's alike.
    """

    name: str
    machine: str
    features: frozenset[str]
    arguments: tuple[str, ...]


_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI = _V4 | {"avx512_vnni"}
# Tuning decides which products are fused with sums, and with that the last bits, so each level has one
# tuning.
_ON_V3 = ("-march=x86-64-v3", "-mtune=znver3")
_ON_V4 = ("-march=x86-64-v4", "-mtune=znver3")

LEVELS: tuple[Level, ...] = (
    Level("portable", "", frozenset(), ()),
    Level("x86-64-v3", "x86_64", _V3, _ON_V3),
    Level("avx-vnni", "x86_64", _V3 | {"avx_vnni"}, (*_ON_V3, "-mavxvnni")),
    Level("x86-64-v4", "x86_64", _V4, _ON_V4),
    Level("avx512-vnni", "x86_64", _VNNI, (*_ON_V4, "-mavx512vnni")),
    Level("avx512-bf16", "x86_64", _VNNI | {"avx512_bf16"}, (*_ON_V4, "-mavx512vnni", "-mavx512bf16")),
    Level(
        "amx-bf16",
        "x86_64",
        _VNNI | {"avx512_bf16", "amx_tile", "amx_bf16"},
        (*_ON_V4, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    ),
    Level("armv8-dotprod", "aarch64", frozenset({"asimd", "asimddp"}), ("-march=armv8.2-a+dotprod",)),
)
"""Ascending within an architecture."""


def of_machine(machine: str | None = None) -> tuple[Level, ...]:
    """The levels of an architecture, ascending.

    Args:
        machine: as ``platform.machine`` names it; without it, this machine's.
    """
    return tuple(level for level in LEVELS if level.machine in ("", machine or platform.machine()))


def executable() -> tuple[Level, ...]:
    """The levels that this processor can execute, ascending."""
    return tuple(level for level in of_machine() if level.features <= _features())


def below(level: Level) -> Level | None:
    """The next lower level that this processor can execute; ``None`` below the lowest."""
    possible = executable()
    index = possible.index(level)
    return possible[index - 1] if index else None


class _InForce:
    """The level in force in this process, and whether native code of it is loaded."""

    level: Level | None = None
    loaded: bool = False


def find(name: str) -> Level:
    """A level that this processor can execute.

    Args:
        name: of a level; ``auto``: the highest that the processor can execute.

    Raises:
        LevelError: there is no such level, or the processor cannot execute it.
    """
    possible = {level.name: level for level in executable()}
    if name != AUTO and name not in possible:
        can = f"choose auto or one that this processor executes: {', '.join(possible)}"
        known = {level.name: level for level in LEVELS}
        if name not in known:
            raise LevelError(f"there is no level {name!r} of native code; {can}")
        level = known[name]
        if level.machine not in ("", platform.machine()):
            raise LevelError(f"{name} is a level of {level.machine}, and this is {platform.machine()}; {can}")
        lacking = ", ".join(sorted(level.features - _features()))
        raise LevelError(f"this processor cannot execute {name}, since it lacks {lacking}; {can}")
    return executable()[-1] if name == AUTO else possible[name]


def use(name: str) -> Level:
    """Sets the level of all native code in this process; must be called before any is loaded.

    Args:
        name: as of ``find``.

    Raises:
        LevelError: there is no such level, or the processor cannot execute it.
        RuntimeError: native code of another level is loaded already.
    """
    level = find(name)
    if _InForce.loaded and level != in_force():
        raise RuntimeError(
            f"native code of level {in_force().name} is loaded already, and {level.name} would have no "
            "effect on it; choose the level before native code is first used"
        )
    _InForce.level = level
    return level


def settle() -> None:
    """Notes that native code of the level in force is loaded: from now on ``use`` accepts no other level."""
    _InForce.loaded = True


def in_force() -> Level:
    """The level in force: the one that was set, or the highest that the processor can execute."""
    return _InForce.level or executable()[-1]


def has_matrix_unit() -> bool:
    """Whether native code of the level in force multiplies prompts by a matrix unit, in bfloat16."""
    return "amx_bf16" in in_force().features


@functools.cache
def _features() -> frozenset[str]:
    """Features of the processor that the system allows, as Linux lists them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = [line.partition(":") for line in lines]
    # Cores may differ: only features of all of them count.
    of_cores = [frozenset(value.split()) for name, _, value in named if name.strip() in ("flags", "Features")]
    found = frozenset.intersection(*of_cores) if of_cores else frozenset()
    return found if "amx_tile" not in found or _may_use_tiles() else found - {"amx_tile"}


def _may_use_tiles() -> bool:
    """Asks Linux for the registers of AMX, which it gives to processes that ask only."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)
