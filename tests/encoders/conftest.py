import pytest

from server.models.resolve import resolve_model
from server.settings import Settings
from tests.e2e.server import Server


@pytest.fixture(scope="session")
def minilm():
    """The real encoder's folder, in the ordinary cache: fetched once per machine."""
    return resolve_model("minilm", Settings().cache_dir, lambda stage, fraction: None).folder


@pytest.fixture(scope="session")
def server(minilm):
    """One server of it, for all tests that leave it as they found it."""
    with Server(
        *("--model", "minilm", "--threads", "1", "--max-running", "8", "--max-queue", "40"),
        *("--on-engine-failure", "restart"),
    ) as running:
        yield running
