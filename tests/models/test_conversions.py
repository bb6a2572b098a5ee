"""Conversions that fail: whose fault it is, is said."""

import json
import os
import resource
import subprocess
import sys

import psutil
import pytest

from server.errors import RefusedError
from server.models.conversions import ConversionError, run_conversion
from server.models.tokenizing.files import find_tokenizer
from tests.models_zoo import save_tiny
from tests.processes import wait_ended


def ignore(*_):
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def full_disk():
    """After it is called, no file may grow beyond some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_not_the_tokenizers_fault(tiny, full_disk, tmp_path):
    model = json.loads((tiny / "tokenizer.json").read_text())["model"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    full_disk(2000)
    with pytest.raises(RefusedError, match=r"tokenizers can't hold the model .*; make room there or choose"):
        find_tokenizer(tmp_path, tmp_path / "cache", ignore)


# Like a program that computes without the interpreter's lock being free, and one that is stopped.
_STUCK = {
    "busy": "import ctypes; ctypes.PyDLL(None).sleep(60)",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("stuck", sorted(_STUCK))
def test_a_conversion_ends_at_once_with_the_process_that_started_it(stuck, tmp_path):
    """Else the next server would write the same folder at the same time: the lock ends with its process."""
    (tmp_path / "program.py").write_text(f"print('begun', flush=True)\n{_STUCK[stuck]}\n")
    starter = (
        "import threading; from pathlib import Path; from server.models.conversions import run_conversion\n"
        "def run(): run_conversion('program', Path('a'), Path('b'), lambda line: print(line, flush=True))\n"
        "threading.Thread(target=run).start()"
    )
    folders = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(tmp_path)])
    with subprocess.Popen(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": folders}
    ) as process:
        assert process.stdout.readline() == b"begun\n"
        (program,) = psutil.Process(process.pid).children()
        process.kill()
        wait_ended(program, 1)


def test_a_conversion_whose_starter_has_died_already_does_not_begin(tmp_path):
    (tmp_path / "program.py").write_text("print('begun')")
    command = [sys.executable, "-m", "server.models.conversions", "1", "program", "a", "b"]
    folders = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(tmp_path)])
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": folders})
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_a_killed_conversion_is_not_explained_by_its_earlier_output(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho a harmless warning >&2\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(
        ConversionError, match=r"^the conversion was ended by signal 9, as .* memory runs out"
    ):
        run_conversion("any", tmp_path, tmp_path / "target", ignore)
