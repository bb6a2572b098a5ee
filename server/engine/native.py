"""The level of native code, set once at start."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from attention.kernels.cpu import calls, levels, native
from server.errors import RefusedError
from server.settings import Settings

log = logging.getLogger("longspan.engine")


@dataclass(frozen=True, slots=True)
class NativeCode:
    """The native code of a CPU.

    Attributes:
        level: the name of the level in force.
        executable: the names of the levels that the processor can execute, ascending.
        origin: where the libraries come from, in words; empty where there are none.
        obstacle: why there are none, with the remedy; else empty.
    """

    level: str
    executable: tuple[str, ...]
    origin: str
    obstacle: str

    def __str__(self) -> str:
        """One sentence without its full stop."""
        if self.obstacle:
            return (
                f"there is no native code: {self.obstacle}; without it a CPU takes slower kernels, and "
                "weights are not packed"
            )
        possible = ", ".join(self.executable)
        return f"native code is of level {self.level}, {self.origin}; this processor executes {possible}"


def set_native_level(settings: Settings) -> NativeCode:
    """Sets the level that the settings name for this process, before native code is loaded.

    Raises:
        RefusedError: the processor cannot execute it.
    """
    try:
        level = levels.find(settings.native_level)
    except levels.LevelError as error:
        raise RefusedError(f"--native-level: {error}") from error
    origin = obstacle = ""
    try:
        if settings.native_level == levels.AUTO:
            level = _available(level)
        levels.use(level.name)
        origin = native.origin(calls.SOURCE)
    except native.NativeError as error:
        obstacle = str(error)
    return NativeCode(level.name, tuple(one.name for one in levels.executable()), origin, obstacle)


def _available(level: levels.Level) -> levels.Level:
    """The level, or the next lower one that the compiler knows."""
    while not native.available(calls.SOURCE, level) and (lower := levels.below(level)) is not None:
        log.warning(
            "the C++ compiler is too old for level %s of this processor, so native code is of level %s; "
            "install a newer one (GCC 11 or Clang 12), or a wheel of Longspan for this platform",
            *(level.name, lower.name),
        )
        level = lower
    return level


def log_native(code: NativeCode) -> None:
    """Logs it, as a warning where there is none."""
    log.log(logging.WARNING if code.obstacle else logging.INFO, "%s", code)
