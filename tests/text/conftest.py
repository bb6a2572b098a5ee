import pytest

from server.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(default_model):
    """The default model's."""
    return Tokenizer(default_model)
