from __future__ import annotations

import os

import pytest

from server.engine.ipc.pulse import Pulse, open_memory
from tests.engine.harness import load
from tests.engine.remembering import remembering
from tests.models_zoo import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(save_tiny("llama", tmp_path_factory.mktemp("engine") / "llama"))


@pytest.fixture
def memory():
    """Of an engine's pulse."""
    descriptor = open_memory()
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def pulse(memory):
    return Pulse(memory)


@pytest.fixture(scope="module")
def simple():
    """A model whose next token depends on every token in its pages."""
    return remembering()
