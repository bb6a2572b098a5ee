from __future__ import annotations

import os

import pytest
import torch
import transformers

from server.engine.ipc.pulse import Pulse, open_memory
from tests.engine.harness import load
from tests.engine.remembering import remembering
from tests.models_zoo import save_tiny


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("engine") / "llama")


@pytest.fixture(scope="session")
def llama(llama_folder):
    return load(llama_folder)


@pytest.fixture(scope="session")
def packed(llama_folder):
    return load(llama_folder, weights="int8")


@pytest.fixture(scope="session")
def own(llama_folder):
    """The same by transformers itself."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        llama_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture
def memory():
    """Of an engine's pulse."""
    descriptor = open_memory()
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def pulse(memory):
    return Pulse(memory)


@pytest.fixture(scope="session")
def simple():
    """A model whose next token depends on every token in its pages."""
    return remembering()
