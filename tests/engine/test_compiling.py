"""What the engine tells of kernels that are compiled within a step."""

import os
import subprocess
import sys

from server.engine import compiling


def test_real_compilations_are_told_of_and_kept_kernels_are_not(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.compiling_program"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, same, another = done.stdout.splitlines()
    assert first == same == "[True, False]"
    assert another == "[True, False, True, False]"


def test_without_triton_nothing_is_asked(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    compiling.tell_of_compiling(lambda under_way: None)
    assert "triton" not in sys.modules, "its import takes a second"
