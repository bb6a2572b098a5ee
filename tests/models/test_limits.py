import logging

import pytest
import torch
import transformers

from server.errors import RefusedError
from server.models.limits import context_length, steady_length
from server.models.load import load_model
from server.models.rope import RopeScaling, apply_scaling, read_scaling
from tests.models_zoo import save_tiny

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


def config(kind="llama", **own):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "head_dim": 16}
    return transformers.AutoConfig.for_model(kind, **{**sizes, "max_position_embeddings": 512, **own})


def rope(kind, **values):
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


@pytest.mark.parametrize(
    ("own", "length", "steady"),
    [
        ({}, 512, None),
        ({"rope_parameters": rope("linear", factor=4.0)}, 512, None),
        ({"rope_parameters": rope("dynamic", factor=4.0)}, 2048, 512),
        ({"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=512)}, 2048, None),
        ({"rope_parameters": rope("yarn", factor=2.0, original_max_position_embeddings=128)}, 512, None),
        ({"rope_parameters": rope("longrope", original_max_position_embeddings=128, **FACTORS)}, 512, 128),
        ({"kind": "gpt2", "n_positions": 64, "max_position_embeddings": 64}, 64, None),
        (
            {
                "kind": "gemma3_text",
                "rope_parameters": {
                    "full_attention": rope("dynamic", factor=2.0),
                    "sliding_attention": rope("default"),
                },
            },
            1024,
            512,
        ),
    ],
)
def test_the_models_own_length(own, length, steady):
    assert context_length(config(**own), None) == length
    assert context_length(config(**own), length) == length
    assert context_length(config(**own), 10) == 10
    assert steady_length(config(**own)) == steady
    with pytest.raises(
        RefusedError, match=rf"--max-context {length + 1} is more than the model's own {length}"
    ):
        context_length(config(**own), length + 1)


def test_a_length_without_end_is_what_the_api_can_say():
    assert context_length(config(max_position_embeddings=10**30), None) == 2**31 - 1


def test_rotary_positions_can_be_stretched_instead():
    with pytest.raises(RefusedError, match="choose at most that or stretch them by --rope-scaling"):
        context_length(config(), 513)
    with pytest.raises(RefusedError, match=r"choose at most that$"):
        context_length(config("gpt2", n_positions=64, max_position_embeddings=64), 513)


def test_an_unknown_length_must_be_said():
    bare = config("bloom", max_position_embeddings=None)
    with pytest.raises(RefusedError, match="does not say how long its context is; say it: --max-context N"):
        context_length(bare, None)
    assert context_length(bare, 77) == 77


def test_a_pattern_of_a_short_reach_lifts_the_limit():
    assert context_length(config(), 100_000, reach=512) == 100_000
    assert context_length(config(), None, reach=512) == 512
    with pytest.raises(RefusedError, match="sinks and window together are 513 positions, more than the 512"):
        context_length(config(), None, reach=513)
    stretched = read_scaling("linear", {"factor": "2"})
    assert context_length(config(), 100_000, reach=1024, scaling=stretched) == 100_000
    dynamic = config(rope_parameters=rope("dynamic", factor=4.0))
    with pytest.raises(RefusedError, match="more than the 512 that the model can tell apart"):
        context_length(dynamic, None, reach=513)
    longrope = config(rope_parameters=rope("longrope", original_max_position_embeddings=128, **FACTORS))
    with pytest.raises(RefusedError, match="more than the 128 that the model can tell apart"):
        context_length(longrope, None, reach=129)


LISTS = {name: ",".join(map(str, values)) for name, values in FACTORS.items()}
LLAMA3 = {"low_freq_factor": "1", "high_freq_factor": "4"}


@pytest.mark.parametrize(
    ("kind", "options", "length"),
    [
        ("default", {}, 512),
        ("default", {"rope_theta": "500000"}, 512),
        ("linear", {"factor": "2.5"}, 1280),
        ("dynamic", {"factor": "4"}, 2048),
        ("yarn", {"factor": "4"}, 2048),
        ("yarn", {"factor": "4", "original_max_position_embeddings": "128"}, 512),
        ("llama3", {"factor": "8", **LLAMA3}, 4096),
        ("longrope", {"factor": "4", **LISTS}, 2048),
        ("longrope", {"original_max_position_embeddings": "128", **LISTS}, 512),
    ],
)
def test_a_scaling_allows_so_many_tokens(kind, options, length):
    scaling, changed = read_scaling(kind, options), config()
    assert context_length(changed, None, scaling=scaling) == length
    written = changed.rope_parameters
    assert written["rope_type"] == kind
    for name, value in scaling.values.items():
        if kind in ("yarn", "llama3", "longrope") or name != "original_max_position_embeddings":
            assert written[name] == value
    assert written["rope_theta"] == float(options.get("rope_theta", 10000))
    if kind != "default":
        with pytest.raises(RefusedError, match=rf"--max-context {length + 1} is more than .* own {length} "):
            context_length(config(), length + 1, scaling=scaling)


def test_plain_rotation_may_go_too_far(caplog):
    with caplog.at_level(logging.WARNING, logger="longspan.models"):
        assert context_length(config(), 512, scaling=RopeScaling("default")) == 512
        assert not caplog.records
        assert context_length(config(), 2000, scaling=RopeScaling("default")) == 2000
    assert "--max-context 2000 is beyond the model's own 512 positions" in caplog.text


def test_a_scaling_replaces_the_models_own():
    own = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 20.0, "attention_factor": 1.5}
    changed = config(rope_parameters=rope("yarn", **own, partial_rotary_factor=0.5))
    assert apply_scaling(changed, read_scaling("linear", {"factor": "2"})) == 256
    assert changed.rope_parameters == rope("linear", factor=2.0, partial_rotary_factor=0.5)
    changed = config(rope_parameters=rope("yarn", **own))
    assert apply_scaling(changed, read_scaling("dynamic", {"factor": "2"})) == 256
    assert changed.max_position_embeddings == 128
    assert changed.rope_parameters == rope("dynamic", factor=2.0)


def test_layers_with_full_attention_are_those_that_change():
    nested = {"full_attention": rope("default"), "sliding_attention": rope("default")}
    changed = config("gemma3_text", rope_parameters=nested)
    assert apply_scaling(changed, read_scaling("linear", {"factor": "2"})) == 1024
    assert changed.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert changed.rope_parameters["sliding_attention"] == rope("default")


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (
            None,
            {"factor": "4"},
            "--rope-option factor is a detail of --rope-scaling; choose that too: default, ",
        ),
        ("linear", {}, "--rope-scaling linear needs factor: add --rope-option factor=..."),
        (
            "llama3",
            {"factor": "2"},
            "needs low_freq_factor and high_freq_factor: add --rope-option low_freq_",
        ),
        ("longrope", {"factor": "2"}, "needs short_factor and long_factor"),
        (
            "linear",
            {"factor": "2", "beta_fast": "1"},
            "linear has no option 'beta_fast'; its options are factor, ",
        ),
        ("default", {"factor": "2"}, "default has no option 'factor'; its options are rope_theta"),
        ("yarn", {"factor": "much"}, "--rope-option factor: 'much' is not a number above 0"),
        ("yarn", {"factor": "nan"}, "'nan' is not a number above 0"),
        ("yarn", {"factor": "0.5"}, "--rope-option factor=0.5: must be at least 1"),
        (
            "yarn",
            {"factor": "2", "original_max_position_embeddings": "1.5"},
            "must be a whole number of tokens",
        ),
        (
            "yarn",
            {"factor": "2", "beta_fast": "1", "beta_slow": "2"},
            "beta_fast=1 must be more than beta_slow=2",
        ),
        (
            "llama3",
            {"factor": "2", "low_freq_factor": "4", "high_freq_factor": "4"},
            "high_freq_factor=4 must be more than low_freq_factor=4",
        ),
        (
            "longrope",
            {**LISTS, "long_factor": "1,,2"},
            "long_factor: '' is not numbers above 0 with commas between",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(kind, options, sentence):
    with pytest.raises(RefusedError) as error:
        read_scaling(kind, options)
    assert sentence in str(error.value)


def test_no_scaling_is_the_models_own():
    assert read_scaling(None, {}) is None


@pytest.mark.parametrize(
    ("kind", "options", "own", "sentence"),
    [
        ("yarn", {"factor": "2"}, {"kind": "gpt2"}, "gpt2 has no rotary embedding to change; leave it out"),
        ("longrope", LISTS, {}, "how far it stretches the 512 positions .* add --rope-option factor="),
        (
            "longrope",
            {"factor": "2", "short_factor": "1,2", "long_factor": "1,2"},
            {},
            "short_factor has 2 numbers, but the model rotates 8 pairs; give one number for each",
        ),
        (
            "yarn",
            {"factor": "2"},
            {"kind": "phi3", "pad_token_id": 0},
            "--rope-scaling yarn doesn't go with phi3: .*longrope.*; leave it out",
        ),
    ],
)
def test_models_that_cannot_have_it_are_refused(kind, options, own, sentence):
    with pytest.raises(RefusedError, match=sentence):
        apply_scaling(config(**own), read_scaling(kind, options))


def test_a_nested_config_without_full_attention_is_refused():
    changed = config()
    changed.rope_parameters = {"main": rope("default"), "other": rope("default")}
    with pytest.raises(
        RefusedError, match="rotary embeddings for main, other layers, and which one is meant"
    ):
        apply_scaling(changed, read_scaling("yarn", {"factor": "2"}))


def test_a_model_that_does_not_read_it_is_refused(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    made = modeling_llama.LlamaRotaryEmbedding.__init__

    def deaf(self, config, **named):
        made(self, config, **named)
        self.rope_type = "default"

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "__init__", deaf)
    folder = save_tiny("llama", tmp_path)
    scaling = read_scaling("yarn", {"factor": "2"})
    with pytest.raises(RefusedError, match="LlamaForCausalLM does not read it from its config"):
        load_model(folder, "float32", "cpu", None, lambda *_: None, scaling=scaling)


def test_frequencies_that_cannot_be_told_are_served_while_they_stay_the_same(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaRotaryEmbedding.forward
    monkeypatch.setattr(
        modeling_llama.LlamaRotaryEmbedding,
        "forward",
        lambda self, x, position_ids: tuple(2 * part for part in own(self, x, position_ids)),
    )
    longrope = rope("longrope", original_max_position_embeddings=128, **FACTORS)
    folder = save_tiny("llama", tmp_path, rope_parameters=longrope)
    with pytest.raises(
        RefusedError, match=r"does not compute longrope as .*serve it within --max-context 128"
    ):
        load_model(folder, "float32", "cpu", None, lambda *_: None)
    loaded = load_model(folder, "float32", "cpu", 128, lambda *_: None)
    assert loaded.rope is None
    assert loaded.context_length == 128


def test_a_scaled_model_in_bfloat16(tmp_path):
    longrope = rope("longrope", original_max_position_embeddings=128, **FACTORS)
    folder = save_tiny("llama", tmp_path, rope_parameters=longrope)
    loaded = load_model(folder, "bfloat16", "cpu", None, lambda *_: None)
    assert (loaded.dtype, loaded.context_length, loaded.rope.steady) == (torch.bfloat16, 512, 128)
