import pytest
from transformers import AutoTokenizer

from server.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(default_model):
    """The default model's."""
    return Tokenizer(default_model)


@pytest.fixture(scope="session")
def transformers_own(default_model):
    """The default model's, as transformers itself reads it."""
    return AutoTokenizer.from_pretrained(default_model)
