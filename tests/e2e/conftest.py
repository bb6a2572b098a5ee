import pytest

from tests.e2e.server import Server


@pytest.fixture(scope="session")
def server(default_model):
    """One server with the real default model, for all tests that leave it as they found it."""
    with Server("--measure-device") as running:
        yield running


@pytest.fixture
def started(tiny_packed):
    """Starts servers of the tiny model and ends those that the test has not."""
    servers = []

    def start(*arguments, **kwargs):
        servers.append(Server(*tiny_packed, *arguments, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()
