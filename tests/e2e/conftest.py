import pytest

from tests.e2e.server import Server
from tests.models_zoo import save_tiny


@pytest.fixture(scope="session")
def server(default_model):
    """One server with the real default model, for all tests that leave it as they found it."""
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A small random model's folder, for servers that tests break."""
    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")
