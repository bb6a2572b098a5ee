"""The gRPC server with the scripted engine, as the tests of the API have it, and a comparison."""

import pytest

from tests.api.conftest import loading, running, settings, tokenizer
from tests.loadtest import usual as plain_figures

__all__ = ["loading", "running", "settings", "tokenizer"]


@pytest.fixture(scope="module")
def usual():
    return plain_figures.usual()
