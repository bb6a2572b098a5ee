import json

import pytest
import torch
import transformers

from server.errors import RefusedError
from server.models import load
from server.models.load import load_model
from tests.models_zoo import KINDS, save_tiny


def serve(folder, dtype="auto", max_context=None):
    return load_model(folder, dtype, "cpu", max_context, lambda stage, fraction: None)


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_the_default_model(default_model):
    told = []
    loaded = load_model(default_model, "auto", "cpu", None, lambda stage, share: told.append(share))
    assert (loaded.architecture, len(loaded.layers)) == ("LlamaForCausalLM", 30)
    assert (loaded.parameters, loaded.vocabulary_size) == (134_515_008, 49152)
    assert (loaded.context_length, loaded.dtype) == (8192, torch.float32)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert told == sorted(told)


def test_dtypes(tmp_path):
    folder = save_tiny("llama", tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert serve(folder).dtype == torch.float32
    assert serve(folder, "bfloat16").dtype == torch.bfloat16
    assert serve(folder, "float16").dtype == torch.float16


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_context_is_at_most_the_models_own(kind, tmp_path):
    folder = save_tiny(kind, tmp_path)
    assert serve(folder).context_length == 512
    assert serve(folder, max_context=100).context_length == 100
    with pytest.raises(RefusedError, match="--max-context 513 is more than the model's own 512"):
        serve(folder, max_context=513)


def test_bloom_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"BloomForCausalLM does not go through .* attention interface"):
        serve(save_tiny("bloom", tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "null", '{"watermarking_config": 5, "eos_token_id": "x"}'])
def test_a_faulty_generation_config_keeps_no_model_away(content, tmp_path):
    folder = save_tiny("llama", tmp_path)
    (folder / "generation_config.json").write_text(content)
    assert serve(folder).architecture == "LlamaForCausalLM"


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    folder = save_tiny("llama", tmp_path)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    with pytest.raises(RefusedError, match="never runs"):
        serve(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_beyond_the_memory_are_refused_before_they_are_loaded(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path)
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(load, "available_bytes", lambda device: size * 3 // 4)
    with pytest.raises(RefusedError, match=r"need 0\.0 GiB, but only 0\.0 GiB of cpu are free"):
        serve(folder)
    assert serve(folder, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bloom"])
def test_saving_the_same_kind_twice_gives_the_same_model(kind, tmp_path):
    first, second = save_tiny(kind, tmp_path / "a"), save_tiny.__wrapped__(kind, tmp_path / "b")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_masks_are_no_weights_but_need_memory(tmp_path, monkeypatch):
    """GPTBigCode has one of all its positions by all."""
    config = transformers.GPTBigCodeConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=320, n_positions=6000)
    transformers.GPTBigCodeForCausalLM(config).save_pretrained(tmp_path)
    assert serve(tmp_path).context_length == 6000
    monkeypatch.setattr(load, "available_bytes", lambda device: 6000 * 6000)
    with pytest.raises(RefusedError, match=r"need 0\.0 GiB, but only 0\.0 GiB of cpu are free"):
        serve(tmp_path)
