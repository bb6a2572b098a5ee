"""Conversions of a model's files, each in a process of its own, which keeps torch out of the server's.

A program is a module that is called with a source and a target. When it fails, the last line of its standard
error is the reason. Run from here it ends with this process, so that it never writes a folder whose lock has
ended with the process that held it.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.parent import end_with_parent


class ConversionError(Exception):
    """The files can't be converted; the message says why, as part of a sentence."""


def run_conversion(program: str, source: Path, target: Path, told: Callable[[str], None]) -> None:
    """Runs a program until it ends.

    Args:
        program: the module.
        source: its first argument.
        target: its second, where it writes.
        told: of each line that it prints.

    Raises:
        ConversionError: it fails, or is killed.
        OSError: the target can't be written.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(os.getpid()), program, str(source), str(target)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                told(line.strip())
        except BaseException:
            process.kill()
            raise
        if (code := process.wait()) == 0:
            return
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"the conversion ended with code {code}"])[-1]
    if code == os.EX_IOERR:
        raise OSError(last)
    if code < 0:  # its earlier output is not the reason
        last = f"the conversion was ended by signal {-code}, as it is where memory runs out"
    raise ConversionError(last)


def arguments() -> tuple[Path, Path]:
    """A program's source and target."""
    return Path(sys.argv[1]), Path(sys.argv[2])


@contextmanager
def writing() -> Iterator[None]:
    """Around a program's writes: where they fail, it ends so that ``run_conversion`` can tell."""
    try:
        yield
    except Exception as error:
        # The libraries that write tokenizers and weights have exceptions of their own for a full disk.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(os.EX_IOERR)


def _main() -> None:
    end_with_parent(int(sys.argv[1]))  # before the program imports anything, which takes seconds
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
