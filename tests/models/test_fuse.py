"""Fused layers compute what transformers' own do, and layers of another shape stay."""

import random

import pytest
import torch
import transformers

from attention.hook import register
from attention.registry import UnsupportedError
from server.models.fused import FusedLayer
from server.models.recognize_layers import fuse, recognize_layers
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.models_zoo import CONTEXT, VOCABULARY, save_tiny

COMMON = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "llama with yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 4,
        }
    },
}
OTHERS = ["gemma2", "gemma3", "gpt_neox", "gpt2", "opt", "mixtral", "qwen3_moe"]

# Models with parts of the common names that compute something else, and how many of two layers are common:
# norms of 1 + weight; multiples of what is added to the residual; norms over all heads at once; a layer
# without rotary positions.
LOOKALIKES = {
    "gemma": ({"head_dim": 16}, 0),
    "granite": ({"residual_multiplier": 0.5}, 0),
    "olmo2": ({}, 0),
    "smollm3": ({"no_rope_layers": [1, 0], "pad_token_id": 0}, 1),
}


class Plain:
    """Attention over one sequence as a whole, causal and within the layer's window."""

    def attend(self, call):
        _, query, key, value, _, features = call
        at = torch.arange(query.shape[2])
        visible = (at <= at[:, None]) & (at[:, None] - at < (features.get("sliding_window") or CONTEXT))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, visible, scale=features["scaling"], enable_gqa=True
        ).transpose(1, 2)


def logits_of(model, ids):
    with torch.inference_mode():
        return model(
            input_ids=ids[None], position_ids=torch.arange(len(ids))[None], use_cache=False, longspan=Plain()
        ).logits[0]


def plain_model(folder):
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation("longspan")
    return model


def fused_layers(model):
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


def fused(model):
    """How many lean layers have taken the place of others."""
    fuse(recognize_layers(model))
    return len(fused_layers(model))


@pytest.mark.parametrize("name", COMMON)
def test_logits_are_equal_to_rounding(name, tmp_path):
    model = plain_model(save_tiny(name.split()[0], tmp_path / "model", **COMMON[name]))
    ids = torch.randint(VOCABULARY, (50,), generator=torch.Generator().manual_seed(1))
    plain = logits_of(model, ids)
    assert fused(model) == 2
    lean = logits_of(model, ids)
    assert not torch.equal(lean, torch.zeros_like(lean))
    torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-4 * float(plain.std()))
    with pytest.raises(UnsupportedError, match="longspan only"):
        model(input_ids=ids[None], use_cache=False)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_stay(kind, tmp_path):
    model = plain_model(save_tiny(kind, tmp_path / kind))
    assert fused(model) == 0
    assert not fused_layers(model)


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_lookalikes_are_told_apart_by_what_they_compute(kind):
    values, common = LOOKALIKES[kind]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    register()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **heads, **values})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("longspan")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    ids = torch.randint(VOCABULARY, (50,), generator=torch.Generator().manual_seed(1))
    plain = logits_of(model, ids)
    assert fused(model) == common
    torch.testing.assert_close(logits_of(model, ids), plain, rtol=1e-4, atol=1e-4 * float(plain.std()))


def test_a_changed_layer_stays(tmp_path):
    """The proof is by computing: a layer whose forward was changed is noticed, of any class."""
    model = plain_model(save_tiny("llama", tmp_path / "llama"))
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.01
    assert fused(model) == 1
    assert model.model.layers[1] is layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_any_dtype_is_proven_in_float32(dtype, tmp_path):
    folder = save_tiny("qwen2", tmp_path / "qwen2")
    assert fused(plain_model(folder).to(dtype)) == 2
    model = plain_model(folder).to(dtype)
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda module, args, output: output * 1.001)
    assert fused(model) == 1
    assert model.model.layers[1] is layer
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_merged_weights_cost_no_second_copy(tmp_path):
    model = plain_model(save_tiny("llama", tmp_path / "llama"))
    plain = list(model.model.layers)
    before = {parameter.data_ptr() for layer in plain for parameter in layer.parameters()}
    fused(model)
    for layer, lean in zip(plain, fused_layers(model), strict=True):
        merged = lean.qkv.weight.untyped_storage()
        for part in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            assert part.weight.untyped_storage().data_ptr() == merged.data_ptr()
        assert lean.o.weight.data_ptr() in before


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_engine_serves_fused_layers(kind, tmp_path):
    loaded = load(save_tiny(kind, tmp_path / kind))
    assert len(fused_layers(loaded.model)) == 2
    rng = random.Random(3)
    prompts = [[rng.randrange(4, VOCABULARY) for _ in range(length)] for length in (3, 30)]
    outcomes = run(make_core(loaded, page_size=4, pages=64), greedy_requests(prompts, 8))
    for prompt, outcome in zip(prompts, outcomes.values(), strict=True):
        tokens = torch.tensor(prompt + outcome.tokens)
        best = logits_of(loaded.model, tokens).argmax(-1)[len(prompt) - 1 : -1]
        assert outcome.tokens == best.tolist()
