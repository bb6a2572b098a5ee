"""Settings that are refused when an engine is built, each with its sentence."""

from __future__ import annotations

import pytest
import torch

from server.engine.build import build_engine
from server.errors import RefusedError
from server.settings import Settings
from tests.models_zoo import CONTEXT, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_context": 100_000}, f"--max-context 100000 is more than the model's own {CONTEXT} positions"),
        ({"kv_memory": "1KiB"}, r"^1 KiB of KV cache hold 0 tokens, .* room for \d+, .* raise --kv-memory"),
        ({"kv_memory": "900TiB"}, r"--kv-memory 921600.0GiB is more than the .* GiB that this machine has"),
        ({"max_batch_tokens": 4, "max_running": 5}, "--max-batch-tokens 4 must be at least --max-running 5"),
        (
            {"speculate": "ngram", "attention": "sparse", "attention_option": {"pattern": "topk"}},
            "--speculate ngram: pattern topk selects by keys, and those of rejected tokens would stay",
        ),
        (
            {"speculate": "self", "attention": "sliding_window"},
            "pattern sliding_window does not see all; use --attention full, or --speculate ngram",
        ),
        ({"speculate": "self", "draft_attention": "full"}, "--draft-attention full: pattern full sees all"),
        (
            {"speculate": "self", "draft_attention": "sparse", "draft_attention_option": {"pattern": "topk"}},
            "--draft-attention sparse: pattern topk needs data of its own in the KV cache",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_sentence(tiny, settings, sentence):
    given = {"device": "cpu", "weights": "float", "threads": torch.get_num_threads(), **settings}
    with pytest.raises(RefusedError, match=sentence):
        build_engine(Settings(**given), tiny, lambda stage, fraction: None)


@pytest.mark.parametrize(
    ("place", "options", "doing", "otherwise"),
    [
        ("server.engine.prepare.prove", {}, "the start-up check", ", or try --kernel sdpa or reference"),
        ("server.engine.prepare.prove", {"kernel": "reference"}, "the start-up check", ""),
        ("server.engine.prepare.compute_own", {"kernel": "reference"}, "the start-up check", ""),
        ("server.models.lay_out.recognize_layers", {}, "recognizing its layers", ""),
        (
            "server.models.executors.rotary.read_rotations",
            {"attention": "sliding_window", "attention_option": {"positions": "cache", "window": "60"}},
            "reading its rotation",
            "",
        ),
    ],
)
def test_any_exception_of_a_model_becomes_a_sentence(tiny, place, options, doing, otherwise, monkeypatch):
    def stumble(*_):
        raise RuntimeError("selected index k\nout of range")

    monkeypatch.setattr(place, stumble)
    sentence = f"LlamaForCausalLM cannot be served: {doing} fails with RuntimeError: selected index k out of"
    sentence += f" range; choose another model{otherwise}$"
    with pytest.raises(RefusedError, match=sentence):
        build_engine(
            Settings(device="cpu", weights="float", threads=torch.get_num_threads(), **options),
            tiny,
            lambda stage, fraction: None,
        )
