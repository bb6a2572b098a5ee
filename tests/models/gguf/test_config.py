import json

import numpy as np
import pytest
from transformers import AutoConfig, GenerationConfig

from server.models.gguf.conversion import convert
from tests.models.gguf.files import rewrite, write
from tests.models.gguf.zoo import CASES, save


@pytest.fixture
def llama(tmp_path):
    save(CASES["llama"], tmp_path / "model")
    return write(tmp_path / "model", tmp_path / "llama.gguf", "llama")


def test_the_config_has_the_numbers_that_the_converter_read(llama, tmp_path):
    file = rewrite(llama, tmp_path / "x.gguf", keys={"llama.attention.layer_norm_rms_epsilon": 1e-5})
    convert(file, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5, "and not the float32 number nearest to it"
    assert (config["max_position_embeddings"], config["vocab_size"]) == (320, 320)
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert (config["bos_token_id"], config["eos_token_id"], config.get("pad_token_id")) == (0, 2, None)


def test_the_files_settings_of_generation_are_kept(llama, tmp_path):
    keys = {"tokenizer.ggml.eot_token_id": 1, "general.sampling.temp": 0.25, "general.sampling.top_k": 20}
    convert(rewrite(llama, tmp_path / "x.gguf", keys=keys), tmp_path / "x")
    generation = GenerationConfig.from_pretrained(tmp_path / "x")
    assert (generation.eos_token_id, generation.bos_token_id) == ([2, 1], 0)
    assert (generation.temperature, generation.top_k, generation.do_sample) == (0.25, 20, True)
    assert AutoConfig.from_pretrained(tmp_path / "x").eos_token_id == [2, 1]


def test_keys_that_the_tokenizer_does_not_know_refuse_the_file(llama, tmp_path):
    file = rewrite(llama, tmp_path / "x.gguf", keys={"tokenizer.ggml.something_new": 1})
    with pytest.raises(ValueError, match=r"it says tokenizer\.ggml\.something_new = 1, and what that means"):
        convert(file, tmp_path / "x")


@pytest.mark.parametrize(
    ("keys", "model_type"),
    [
        ({}, "llama"),
        ({"llama.attention.sliding_window": 12}, "mistral"),
        ({"llama.attention.sliding_window": 0}, "llama"),
    ],
)
def test_the_keys_of_a_llama_file_decide_its_model(llama, tmp_path, keys, model_type):
    convert(rewrite(llama, tmp_path / "x.gguf", keys=keys), tmp_path / "x")
    config = AutoConfig.from_pretrained(tmp_path / "x")
    assert config.model_type == model_type
    assert getattr(config, "sliding_window", None) == (12 if model_type == "mistral" else None)


def test_frequency_factors_of_another_kind_are_kept_as_they_are(llama, tmp_path):
    factors = np.array([1.0, 3.0, 2.0, 9.0], np.float32)
    convert(rewrite(llama, tmp_path / "x.gguf", tensors={"rope_freqs.weight": factors}), tmp_path / "x")
    rope = AutoConfig.from_pretrained(tmp_path / "x").rope_parameters
    assert rope["rope_type"] == "longrope"
    assert rope["short_factor"] == rope["long_factor"] == factors.tolist()
    assert rope["attention_factor"] == 1.0


def test_older_files_leave_the_size_of_experts_to_that_of_a_dense_layer(tmp_path):
    config = {**CASES["qwen2moe"].config, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48}
    case = CASES["qwen2moe"]._replace(config=config)
    save(case, tmp_path / "model")
    file = write(tmp_path / "model", tmp_path / "moe.gguf", "qwen2moe")
    sizes = ("qwen2moe.expert_feed_forward_length", "qwen2moe.expert_shared_feed_forward_length")
    convert(rewrite(file, tmp_path / "x.gguf", keys=dict.fromkeys(sizes)), tmp_path / "x")
    found = AutoConfig.from_pretrained(tmp_path / "x")
    assert (found.moe_intermediate_size, found.shared_expert_intermediate_size) == (24, 48)
