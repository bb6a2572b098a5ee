import pytest

from tests.e2e.server import Server


@pytest.fixture(scope="session")
def server(default_model):
    """One server with the real default model, for all tests that leave it as they found it."""
    with Server("--measure-device") as running:
        yield running
