"""The gRPC server with the scripted engine, as the tests of the API have it, and a comparison."""

import pytest

from server.observe.metrics_server import listen
from tests.api.conftest import always, callers, loading, running, settings, tokenizer
from tests.loadtest import usual as plain_figures

__all__ = ["callers", "loading", "running", "served", "settings", "tokenizer"]


@pytest.fixture
async def served(running):
    """The server with room for many, and its port and its metrics' port."""
    running.state.admission.limit = 100
    http, metrics_port = listen(running.registry, "127.0.0.1", 0, always)
    yield running, running.port, metrics_port
    http.close()


@pytest.fixture(scope="module")
def usual():
    return plain_figures.usual()
