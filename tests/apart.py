"""Test files that need a process of their own, since Triton settles at its import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def interpret(*paths: str) -> None:
    """Runs test files, paths from the root, with Triton's interpreter in place of a GPU."""
    _needs_triton()
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        pytest.skip("before 3.7 Triton's interpreter does not work with numpy 2.4")
    _run(paths, "1")


def compile_only(*paths: str) -> None:
    """Runs test files, paths from the root, where Triton compiles for GPUs that are not there."""
    _needs_triton()
    _run(paths, "0")


def _needs_triton() -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")


def _run(paths: tuple[str, ...], interpreted: str) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": interpreted,
        "XFORMERS_ENABLE_TRITON": interpreted,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def _release(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))
