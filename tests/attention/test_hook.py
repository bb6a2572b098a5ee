from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from attention import UnsupportedError, read_layers, resolve
from tests.attention.models import EXPERTS, OWN, paged_logits, tiny


@pytest.mark.parametrize("kind", OWN)
def test_logits_equal_transformers(kind):
    model = tiny(kind)
    layers = read_layers(model)
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 97, (n,), generator=random).tolist() for n in (23, 1, 12)]
    eager = tiny(kind, "eager")
    with torch.inference_mode():
        expected = [eager(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]
    for kernel, chunk in (("auto", 1000), ("auto", 1), ("reference", 9)):
        attention = resolve("full", {}, kernel, layers, "cpu", torch.float32, 4)
        found = paged_logits(model, layers, attention, prompts, chunk)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_specs_of_a_plain_model():
    layers = read_layers(tiny("llama"))
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    spec = layers[0]
    assert (spec.query_heads, spec.kv_heads, spec.head_size, spec.value_size) == (4, 2, 8, 8)
    assert spec.scale == pytest.approx(8**-0.5)
    assert (spec.window, spec.softcap, spec.sinks) == (None, None, False)


def test_windows_softcaps_scales_and_sinks_are_read():
    assert [layer.window for layer in read_layers(tiny("qwen2"))] == [None, None, 9, 9]
    assert [layer.window for layer in read_layers(tiny("mistral"))] == [9, 9, 9, 9]
    gemma = read_layers(tiny("gemma2"))
    assert [layer.window for layer in gemma] == [9, None, 9, None]
    assert {layer.softcap for layer in gemma} == {0.5}
    assert gemma[0].scale == pytest.approx(12**-0.5)
    assert all(layer.sinks for layer in read_layers(tiny("gpt_oss")))


def test_reading_leaves_no_mask_function_behind():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    read_layers(tiny("llama"))
    assert "longspan" not in ALL_MASK_ATTENTION_FUNCTIONS


def test_a_model_with_few_positions():
    assert len(read_layers(tiny("gpt2", n_positions=8))) == 4


@pytest.mark.parametrize("kind", ["bloom", "falcon", "mpt", "gptj"])
def test_architectures_beside_the_interface_are_refused(kind):
    own: dict[str, Any] = {
        "bloom": {"n_layer": 2, "n_head": 4},
        "falcon": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "mpt": {"n_layers": 2, "n_heads": 4, "d_model": 32},
        "gptj": {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 4},
    }
    model = tiny(kind, **own[kind])
    with pytest.raises(UnsupportedError, match="transformers' attention interface"):
        read_layers(model)


@pytest.mark.parametrize(
    ("kind", "own", "sentence"),
    [
        ("qwen3_next", {"num_hidden_layers": 4}, "structure of its linear_attention layers"),
        (
            "llama4_text",
            {"num_local_experts": 2, "intermediate_size_mlp": 32},
            "structure of its chunked_attention",
        ),
        ("t5", {}, "encoder-decoder"),
    ],
)
def test_structure_that_serving_would_lose_is_refused(kind, own, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        read_layers(_untouched(kind, own))


def test_a_window_that_only_the_mask_knows_is_found():
    assert [layer.window for layer in read_layers(tiny("qwen2_moe"))] == [9, None, 9, None]
    assert [layer.window for layer in read_layers(tiny("phimoe"))] == [9, 9, 9, 9]


def test_a_mask_that_is_no_window_is_refused():
    with pytest.raises(UnsupportedError, match="layers 0-3 use a mask"):
        read_layers(tiny("doge"))


def test_a_mask_that_contradicts_the_arguments_is_refused():
    model = tiny("gemma2")
    model.model.layers[2].self_attn.sliding_window = 8
    with pytest.raises(UnsupportedError, match="the mask of layer 2 and the arguments"):
        read_layers(model)
    with pytest.raises(UnsupportedError, match="the mask of layers 0-3 and the arguments"):
        read_layers(tiny("olmoe", **EXPERTS, sliding_window=9))


def test_a_window_that_goes_missing_is_refused(monkeypatch):
    monkeypatch.setattr("attention.layers._masks_at", lambda positions: nullcontext())
    model = tiny("gemma2")
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(UnsupportedError, match="the mask of layer 0 and the arguments"):
        read_layers(model)


def test_a_model_that_counts_its_own_positions_is_refused():
    model = tiny("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids, **named: forward(*args, **named)
    with pytest.raises(UnsupportedError, match="does not follow position_ids"):
        read_layers(model)


def test_layers_that_pass_no_keyword_arguments_on_are_served_through_forward():
    model = tiny("stablelm")
    assert len(read_layers(model)) == 4
    with pytest.raises(UnsupportedError, match=r"call the model by attention\.forward\.forward"):
        model(torch.tensor([[1, 2]]), use_cache=False, longspan=object())


def test_a_bidirectional_model_is_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedError, match="layer 1 is not causal"):
        read_layers(model)


def test_a_layer_that_runs_twice_is_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(UnsupportedError, match="layer 0 calls attention more than once"):
        read_layers(model)


def test_a_forward_without_the_keyword_is_an_error():
    with pytest.raises(UnsupportedError, match="without the keyword argument longspan"):
        tiny("llama")(torch.tensor([[1, 2]]), use_cache=False)


def _untouched(kind, own):
    """Some architectures have no causal head or dislike being shrunk; they are made as they are."""
    from transformers import AutoModelForSeq2SeqLM, T5Config

    if kind != "t5":
        return tiny(kind, **own)
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return AutoModelForSeq2SeqLM.from_config(config)
