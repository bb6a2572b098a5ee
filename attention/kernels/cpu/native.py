"""C++ compiled for this very machine when first used, and kept for the next time.

Nothing but a C++ compiler is needed: no headers of Python or torch, since what is compiled has plain C entry
points.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_COMPILE_SECONDS = 300
_INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)


class NativeError(RuntimeError):
    """What cannot be compiled or loaded here; the message says why, as part of a sentence."""


def compiler() -> list[str]:
    """The C++ compiler and its own arguments: the environment variable CXX, or the first that is installed.

    Raises:
        NativeError: there is none.
    """
    if asked := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(asked[0]) is None:
            raise NativeError(f"CXX names {asked[0]}, which is not there; install it or unset CXX")
        return asked
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise NativeError(f"there is no C++ compiler; install one ({', '.join(_COMPILERS)}) or name it in CXX")


def kept() -> Path:
    """Where compiled libraries are kept: ``kernels`` in the cache folder, which LONGSPAN_CACHE_DIR moves."""
    return Path(os.environ.get("LONGSPAN_CACHE_DIR", "~/.cache/longspan")).expanduser() / "kernels"


def load(main: Path, folder: Path) -> ctypes.CDLL:
    """A source file as a shared library for this machine's processor.

    Compiled once for each compiler, processor and content of the file and of all that it includes in quotes.
    Processes that do so at the same time don't disturb each other. Where ``folder`` cannot be written, a
    temporary one serves.

    Args:
        main: the source file.
        folder: where compiled libraries are kept; made if it is missing.

    Raises:
        NativeError: no compiler, or it fails.
    """
    command = (*compiler(), *_FLAGS)
    content = tuple((path.name, path.read_text()) for path in _with_included(main))
    library = _attempt(command, main, content, folder)
    if isinstance(library, str):
        raise NativeError(library)
    return library


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


def _with_included(main: Path) -> list[Path]:
    """The file and all that it includes in quotes, and so on, each once."""
    found = [main.resolve()]
    for path in found:
        named = [(path.parent / name).resolve() for name in _INCLUDE.findall(path.read_text())]
        found += [name for name in dict.fromkeys(named) if name not in found]
    return found


@functools.cache
def _attempt(
    command: tuple[str, ...], main: Path, content: tuple[tuple[str, str], ...], folder: Path
) -> ctypes.CDLL | str:
    """The library, or why there is none: asked often, and compiling in vain takes seconds too."""
    try:
        key = hashlib.sha256(repr((command, _version(command), _processor(), content)).encode()).hexdigest()
        return _kept_or_compiled(command, main, folder / f"{main.stem}-{key[:24]}.so")
    except (NativeError, OSError) as error:
        return str(error)


def _kept_or_compiled(command: tuple[str, ...], main: Path, kept: Path) -> ctypes.CDLL:
    if kept.exists():
        with contextlib.suppress(OSError):  # cut short by a crash or a full disk
            return ctypes.CDLL(str(kept))
    # The folder may be read-only, or nothing may be run from where it lies.
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as workplace:
            os.replace(_compile(command, main, Path(workplace)), kept)
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as workplace:
        return ctypes.CDLL(str(_compile(command, main, Path(workplace))))


def _compile(command: tuple[str, ...], main: Path, folder: Path) -> Path:
    target = folder / f"{main.stem}.so"
    done = _run([*command, str(main), "-o", str(target)])
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines()
        first = errors[0].strip() if errors else f"exit status {done.returncode}"
        raise NativeError(f"{command[0]} cannot compile {main.name}: {first}")
    return target


def _version(command: tuple[str, ...]) -> str:
    return _run([*command[: -len(_FLAGS)], "--version"]).stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        # In other languages an error is not called one.
        plain = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, env=plain)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{command[0]} cannot run: {error}") from error


def _processor() -> tuple[str, ...]:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    named = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return platform.machine(), *sorted({line for line in lines if line.split("\t")[0].strip() in named})
