"""Settings and fixtures of all tests."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from server.models.resolve import resolve_model
from server.settings import Settings

# Threads that wait by spinning make every kernel many times slower when something else wants a core, and in
# these tests a server, a client and a model often do. torch, which reads this, is not imported yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In the background (``make test &``, nohup) interrupts are ignored, and a process passes that on to those it
# starts, of which tests interrupt some. A handler that does nothing is not passed on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda number, frame: None)


# An example that a busy machine makes slow is no failure.
hypothesis_settings.register_profile("without a deadline", deadline=None)
hypothesis_settings.load_profile("without a deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's Hugging Face folder, in the ordinary cache: fetched once per machine."""
    return resolve_model(None, Settings().cache_dir, lambda stage, fraction: None).folder
