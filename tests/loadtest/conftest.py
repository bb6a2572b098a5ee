"""The gRPC server with the scripted engine, as the tests of the API have it."""

from tests.api.conftest import loading, running, settings, tokenizer

__all__ = ["loading", "running", "settings", "tokenizer"]
