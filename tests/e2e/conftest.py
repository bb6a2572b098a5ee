import pytest

from tests.e2e.server import Server
from tests.kernels import share_kernels
from tests.models_zoo import save_tiny


@pytest.fixture(scope="session")
def server(default_model):
    """One server with the real default model, for all tests that leave it as they found it."""
    with Server("--measure-device") as running:
        yield running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A small random model's folder, for servers that tests break."""
    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def tiny_packed(tiny, tmp_path_factory):
    """Options of servers of ``tiny`` that start in half the time: only the first one imports transformers.

    It packs the weights and keeps them for all others, as with the default model.
    """
    cache = share_kernels(tmp_path_factory.mktemp("packed"))
    return ("--model", tiny, "--weights", "int8", "--cache-dir", cache, "--threads", "1")
