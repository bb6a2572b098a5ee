"""What all tests share."""

import os
from pathlib import Path

import pytest

from server.models.resolve import resolve_model
from server.settings import Settings

# Threads that wait by spinning make every kernel many times slower when something else wants a core, and in
# these tests a server, a client and a model often do. torch, which reads this, is not imported yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's Hugging Face folder, in the ordinary cache: fetched once per machine."""
    return resolve_model(None, Settings().cache_dir, lambda stage, fraction: None).folder
