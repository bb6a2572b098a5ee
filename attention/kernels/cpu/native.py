"""Native code at the level in force: a library that the wheel carries, or one compiled at its first use.

Libraries compiled here are kept for the next process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from attention.kernels.cpu import layout, levels
from attention.kernels.cpu.compiling import NativeError, accepts, compiled, compiler, kept_path, packaged
from attention.kernels.cpu.levels import Level
from attention.kernels.cpu.trust import distrust, private

log = logging.getLogger("longspan.attention")

__all__ = ["NativeError", "available", "kept", "load", "openmp", "origin"]


def kept() -> Path:
    """Where compiled libraries are kept: ``kernels`` in the cache folder, which LONGSPAN_CACHE_DIR moves."""
    return Path(os.environ.get("LONGSPAN_CACHE_DIR", "~/.cache/longspan")).expanduser() / "kernels"


def load(main: Path, folder: Path, structures: Sequence[type[ctypes.Structure]] = ()) -> ctypes.CDLL:
    """A source file as a shared library at the level in force.

    If ``folder`` cannot be written, or others can write it, a temporary one is used.

    Args:
        main: the source file.
        folder: where compiled libraries are kept; made if it is missing.
        structures: those that the library takes; compared with its own description of them.

    Raises:
        NativeError: the package does not carry it, and there is no compiler, or it fails.
        LayoutError: the library and Python disagree about a structure.
    """
    level = levels.in_force()
    carried = packaged(main, level.name, level.arguments)
    if carried.exists():
        library = ctypes.CDLL(str(carried))
    else:
        found = _attempt(compiler(), kept_path(main, level.arguments, folder), main, level)
        if isinstance(found, str):
            raise NativeError(found)
        library = found
    if structures:
        layout.check(library, main.name, structures)
    levels.settle()
    return library


def available(main: Path, level: Level) -> bool:
    """Whether ``load`` would find the library at this level, or a compiler that knows the level.

    Raises:
        NativeError: there is no compiler.
    """
    return packaged(main, level.name, level.arguments).exists() or accepts(level.arguments)


def origin(main: Path) -> str:
    """Where ``load`` gets the library from, in words; compiles nothing.

    Raises:
        NativeError: from nowhere; the message says why.
    """
    level = levels.in_force()
    if packaged(main, level.name, level.arguments).exists():
        return "as the package carries it"
    return f"compiled here at first use, by {' '.join(compiler())}"


def openmp(*names: str) -> list[int]:
    """Addresses of functions of torch's own OpenMP runtime, so that there is one pool of threads.

    Args:
        names: of GNU OpenMP's own interface, like ``GOMP_parallel``.

    Raises:
        NativeError: torch uses another runtime.
    """
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
    except (OSError, AttributeError):
        found = [None]
    addresses = [address for address in found if address is not None]
    if len(addresses) < len(names):
        raise NativeError("its threads are GNU OpenMP's, which this torch does not use")
    return addresses


@functools.cache
def _attempt(command: tuple[str, ...], target: Path, main: Path, level: Level) -> ctypes.CDLL | str:
    """The library, or why there is none; cached, since a failing compilation takes seconds too.

    ``target`` differs by content and compiler.
    """
    try:
        return _kept_or_compiled(target, main, level)
    except (NativeError, OSError) as error:
        return str(error)


def _kept_or_compiled(target: Path, main: Path, level: Level) -> ctypes.CDLL:
    # The folder may be read-only, or mounted without permission to execute.
    with contextlib.suppress(OSError):
        if reason := private(target.parent):
            log.warning(
                "compiled kernels in %s are not loaded, and none are kept there, so that every start "
                "compiles them: %s; remove that folder, or name another cache folder (LONGSPAN_CACHE_DIR)",
                target.parent,
                reason,
            )
        else:
            return _from(target, main, level)
    with tempfile.TemporaryDirectory() as workplace:
        return ctypes.CDLL(str(compiled(main, level.arguments, Path(workplace))))


def _from(target: Path, main: Path, level: Level) -> ctypes.CDLL:
    """The library that is kept, or compiled where that is missing, broken, or may be another user's."""
    if target.exists():
        if reason := distrust(target):
            log.warning("%s is not loaded but compiled again: %s", target, reason)
        else:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(target))
        target.unlink()  # cut short by a crash or a full disk, or not to be trusted
    return ctypes.CDLL(str(compiled(main, level.arguments, target.parent)))
