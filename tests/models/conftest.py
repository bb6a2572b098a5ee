import contextlib
import io
import runpy
import sys
import warnings
from unittest.mock import patch

import pytest
import torch

from server.models import conversions


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices gain nothing from several, and lose much beside another busy process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class _Here:
    """Stands in for a conversion's process, which imports for seconds: its program runs in this one."""

    def __init__(self, command, *, stderr, **_):
        *_, program, source, target = command
        self.stdout, self.code = io.StringIO(), 0
        said = contextlib.redirect_stdout(self.stdout), contextlib.redirect_stderr(stderr)
        with patch.object(sys, "argv", [program, source, target]), said[0], said[1]:
            try:
                # It has been imported already.
                with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
                    runpy.run_module(program, run_name="__main__")
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=stderr)
                self.code = end.code if isinstance(end.code, int) else 1
        self.stdout.seek(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self):
        return self.code


@pytest.fixture
def conversions_here(monkeypatch):
    """No processes for conversions; ``test_conversions`` and ``test_gguf`` have real ones."""
    monkeypatch.setattr(conversions.subprocess, "Popen", _Here)
