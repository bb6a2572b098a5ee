"""Compiles C++ sources to shared libraries.

Imports only the standard library: the build of the wheel runs this file before anything is installed. It
needs a C++ compiler, but no headers of Python or torch, since the libraries have plain C entry points.
"""

from __future__ import annotations

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
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_COMPILE_SECONDS = 300
_INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)


class NativeError(RuntimeError):
    """Native code that cannot be compiled or loaded here; the message says why, as part of a sentence."""


def compiler() -> tuple[str, ...]:
    """The C++ compiler and its own arguments: the environment variable CXX, or the first that is installed.

    Raises:
        NativeError: there is none.
    """
    if asked := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(asked[0]) is None:
            raise NativeError(f"CXX names {asked[0]}, which is not there; install it or unset CXX")
        return tuple(asked)
    for name in _COMPILERS:
        if shutil.which(name):
            return (name,)
    raise NativeError(
        f"there is no C++ compiler; install one ({', '.join(_COMPILERS)}) or name it in CXX, or install a "
        "wheel of Longspan for this platform, which carries the code compiled"
    )


def packaged(main: Path, level: str, arguments: tuple[str, ...]) -> Path:
    """Where a wheel carries the library of a source file; its name tells it from those of other sources.

    Args:
        main: the source file.
        level: its name.
        arguments: of the compiler, for the level.
    """
    key = _digest(_FLAGS, arguments, _content(main))
    return main.parent / "compiled" / f"{main.stem}-{level}-{key}.so"


def compiled(main: Path, arguments: tuple[str, ...], folder: Path) -> Path:
    """The library of a source file, compiled if ``folder`` does not keep it.

    One is kept for each compiler, level, and content of the file and of all that it includes in quotes.
    Processes may call this at the same time.

    Args:
        main: the source file.
        arguments: of the compiler, for the level.
        folder: where compiled libraries are kept; made if it is missing.

    Raises:
        NativeError: there is no compiler, or it fails.
        OSError: ``folder`` cannot be written.
    """
    kept = kept_path(main, arguments, folder)
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            made = _compile(main, arguments, Path(workplace))
            made.chmod(0o755)  # whatever the umask: others must not be able to change it
            os.replace(made, kept)
    return kept


def kept_path(main: Path, arguments: tuple[str, ...], folder: Path) -> Path:
    """The file of ``compiled``, which may not be there yet.

    Raises:
        NativeError: there is no compiler.
    """
    command = compiler()
    version = _run([*command, "--version"]).stdout
    key = _digest(command, version, platform.machine(), _FLAGS, arguments, _content(main))
    return folder / f"{main.stem}-{key}.so"


def accepts(arguments: tuple[str, ...]) -> bool:
    """Whether the compiler knows a level's arguments; old ones don't know newer processors.

    Args:
        arguments: of the compiler, for the level.

    Raises:
        NativeError: there is no compiler.
    """
    return _run([*compiler(), *arguments, "-fsyntax-only", "-x", "c++", os.devnull]).returncode == 0


def _compile(main: Path, arguments: tuple[str, ...], folder: Path) -> Path:
    target = folder / f"{main.stem}.so"
    command = [*compiler(), *_FLAGS, *arguments]
    done = _run([*command, str(main), "-o", str(target)])
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines()
        first = errors[0].strip() if errors else f"exit status {done.returncode}"
        raise NativeError(f"{command[0]} cannot compile {main.name}: {first}")
    return target


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        # Messages in English: ``_compile`` searches them for "error:".
        plain = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, env=plain)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{command[0]} cannot run: {error}") from error


def _content(main: Path) -> list[tuple[str, str]]:
    """Names and texts of the file and of all that it includes in quotes, directly or not, each once."""
    found = [main.resolve()]
    for path in found:
        named = [(path.parent / name).resolve() for name in _INCLUDE.findall(path.read_text())]
        found += [name for name in dict.fromkeys(named) if name not in found]
    return [(path.name, path.read_text()) for path in found]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
