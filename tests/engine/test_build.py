"""What of the settings is refused when an engine is built, and with which sentence."""

from __future__ import annotations

import pytest
import torch

from server.engine.build import build_engine
from server.engine.types import RefusedError
from server.settings import Settings
from tests.models_zoo import CONTEXT, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_context": 100_000}, f"--max-context 100000 is more than the model's own {CONTEXT} positions"),
        ({"kv_memory": "1KiB"}, "hold not even one page of 16 tokens .* raise --kv-memory"),
        ({"max_batch_tokens": 4}, "--max-batch-tokens 4 must be at least"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_sentence(tiny, settings, sentence):
    given = {"device": "cpu", "weights": "float", "threads": torch.get_num_threads(), **settings}
    with pytest.raises(RefusedError, match=sentence):
        build_engine(Settings(**given), tiny, lambda stage, fraction: None)
