"""Rotary embeddings: rerotated keys, and frequencies that depend on a sequence's length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.phi import modeling_phi

from attention import UnsupportedError, read_layers
from attention.patterns.sliding_window import SlidingWindow
from attention.rope import LengthRope
from attention.rotation import Rotation, read_rotations
from tests.attention.models import tiny

HEAD, ORIGINAL = 16, 64
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, **FACTORS},
    "dynamic": {"factor": 4.0},
}
positions = st.lists(st.integers(0, 4000), min_size=1, max_size=9)


def config(kind, scaling="default", **own):
    rope = {"rope_type": scaling, "rope_theta": 10000.0, **SCALINGS[scaling]}
    return AutoConfig.for_model(
        kind,
        hidden_size=64,
        num_attention_heads=4,
        head_dim=HEAD,
        max_position_embeddings=4 * ORIGINAL,
        rope_parameters={**rope, **own},
    )


def check_shift(rotary, rotate, rotation, at, shift):
    """Keys rotated at ``at`` and rerotated by ``shift`` are those rotated at ``at + shift`` from scratch."""
    at = torch.tensor(at)
    shift = (at * 7919 % 997) - 400 if shift is None else torch.full_like(at, shift)
    shift = shift.maximum(-at)
    raw = torch.randn(1, 3, len(at), HEAD, generator=torch.Generator().manual_seed(0))

    def scratch(where):
        # One position at a time: transformers' longrope would take its factors from the longest.
        parts = [rotary(raw, torch.tensor([[p]])) for p in where.tolist()]
        cos, sin = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return rotate(raw, cos, sin)[0].transpose(0, 1)

    rerotated = rotation.rotate(scratch(at), shift)
    torch.testing.assert_close(rerotated, scratch(at + shift), rtol=0, atol=2e-3)


@pytest.mark.parametrize("scaling", ["default", "linear", "yarn", "llama3"])
@given(at=positions, shift=st.none() | st.integers(-4000, 4000))
def test_rerotating_equals_rotating_from_scratch(scaling, at, shift):
    rotary = modeling_llama.LlamaRotaryEmbedding(config("llama", scaling))
    rotation = Rotation(rotary.inv_freq.double())
    check_shift(rotary, lambda x, *a: modeling_llama.apply_rotary_pos_emb(x, x, *a)[0], rotation, at, shift)


@pytest.mark.parametrize("long", [False, True])
def test_rerotating_with_the_factors_of_longrope(long):
    rotary = modeling_llama.LlamaRotaryEmbedding(config("llama", "longrope"))
    assert rotary.attention_scaling > 1
    at = [100, 700, 65] if long else [0, 5, 50]
    rotary(torch.zeros(1), torch.tensor([at]))
    rotation = Rotation(rotary.inv_freq.double().clone())
    check_shift(
        rotary,
        lambda x, *a: modeling_llama.apply_rotary_pos_emb(x, x, *a)[0],
        rotation,
        at,
        13,
    )


def test_rerotating_does_not_apply_the_attention_factor_of_yarn():
    rotary = modeling_llama.LlamaRotaryEmbedding(config("llama", "yarn"))
    assert rotary.attention_scaling > 1.1
    key = torch.randn(5, 2, HEAD)
    rerotated = Rotation(rotary.inv_freq.double()).rotate(key, torch.tensor([0, 1, 20, -7, 3000]))
    torch.testing.assert_close(rerotated.norm(dim=-1), key.norm(dim=-1))
    torch.testing.assert_close(rerotated[0], key[0], rtol=0, atol=0)


@given(at=positions, shift=st.none() | st.integers(-4000, 4000))
def test_rerotating_interleaved_pairs(at, shift):
    rotary = modeling_cohere.CohereRotaryEmbedding(config("cohere"))
    rotation = Rotation(rotary.inv_freq.double(), interleaved=True)
    check_shift(rotary, lambda x, *a: modeling_cohere.apply_rotary_pos_emb(x, x, *a)[0], rotation, at, shift)


@given(at=positions, shift=st.none() | st.integers(-4000, 4000))
def test_rerotating_half_of_the_head(at, shift):
    rotary = modeling_glm.GlmRotaryEmbedding(config("glm", partial_rotary_factor=0.5))
    rotation = Rotation(rotary.inv_freq.double(), interleaved=True)
    assert rotation.size == HEAD // 2
    check_shift(rotary, lambda x, *a: modeling_glm.apply_rotary_pos_emb(x, x, *a)[0], rotation, at, shift)

    rotary = modeling_phi.PhiRotaryEmbedding(config("phi", partial_rotary_factor=0.5))

    def rotate(x, cos, sin):
        part = modeling_phi.apply_rotary_pos_emb(x[..., : HEAD // 2], x[..., : HEAD // 2], cos, sin)[0]
        return torch.cat([part, x[..., HEAD // 2 :]], dim=-1)

    check_shift(rotary, rotate, Rotation(rotary.inv_freq.double()), at, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "interleaved", "size", "own"),
    [
        ("llama", False, 8, {}),
        ("llama", False, 8, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}),
        ("cohere", True, 8, {}),
        ("glm", True, 4, {}),
        ("stablelm", False, 2, {}),
        ("nemotron", False, 4, {}),
        ("gpt_neox", False, 2, {}),
        ("qwen3", False, 8, {}),
    ],
)
def test_a_models_rotation_is_found(kind, interleaved, size, own, dtype):
    model = tiny(kind, **own).to(dtype)
    found = read_rotations(model, read_layers(model))
    assert sorted(found) == [0, 1, 2, 3]
    (rotation,) = set(found.values())
    assert (rotation.interleaved, rotation.size, rotation.start) == (interleaved, size, 0)


def test_a_rotation_at_the_end_of_the_head_is_found():
    sizes = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    model = tiny("deepseek_v3", **sizes, num_key_value_heads=4, first_k_dense_replace=4)
    (rotation,) = set(read_rotations(model, read_layers(model)).values())
    assert (rotation.start, rotation.size) == (8, 8)


def test_layers_of_two_types_have_two_rotations():
    model = tiny("gemma3_text")
    found = read_rotations(model, read_layers(model))
    local, full = found[0], found[1]
    assert (found[2], found[3]) == (local, full)
    assert not torch.equal(local.frequencies, full.frequencies)
    rotary = model.model.rotary_emb
    torch.testing.assert_close(full.frequencies.float(), rotary.full_attention_inv_freq)
    torch.testing.assert_close(local.frequencies.float(), rotary.sliding_attention_inv_freq)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("gpt2", "layers 0-3"),
        ("opt", "layers 0-3"),
        ("whisper", "layers 0-3"),
        ("smollm3", "layer 3"),
        ("afmoe", "layers 1, 3"),
    ],
)
def test_keys_that_do_not_rotate_are_refused(kind, layers):
    model = tiny(kind)
    with pytest.raises(UnsupportedError, match=rf"those of {layers} of .* don't; choose positions=original"):
        read_rotations(model, read_layers(model))


def test_a_table_that_is_not_the_models_own_is_not_used():
    model = tiny("llama")
    layers = read_layers(model)
    model.model.rotary_emb.register_forward_hook(
        lambda module, args, output: tuple(part.roll(1, dims=-1) for part in output)
    )
    with pytest.raises(UnsupportedError, match="choose positions=original"):
        read_rotations(model, layers)


@given(window=st.integers(1, 30), sinks=st.integers(0, 9), last=st.integers(0, 120))
def test_in_cache_positions_are_indices_into_the_cache(window, sinks, last):
    pattern = SlidingWindow(window, sinks, positions="cache")
    at = torch.arange(last + 1)
    kept = [j for j in range(last + 1) if pattern.visible(torch.tensor(last), torch.tensor(j))]
    shift = int(pattern.rerotation(at)[last])
    for index, j in enumerate(kept):
        distance = len(kept) - 1 - index
        assert distance < pattern.reach
        if j < pattern.rerotated:
            assert last - shift - j == distance
        else:
            assert last - j == distance
    assert pattern.rerotation(at).diff().ge(0).all()


def test_original_positions_rerotate_nothing():
    for pattern in (SlidingWindow(8, 2), SlidingWindow.from_options({"positions": "original"})):
        assert (pattern.rerotated, pattern.reach) == (0, None)
    assert SlidingWindow(8, 2, (1,), "cache").reach is None
    with pytest.raises(ValueError, match="positions is 'rotated'; choose original or cache"):
        SlidingWindow.from_options({"positions": "rotated"})


def rope_of(scaling, kind="llama", **own):
    parameters = {"rope_type": scaling, "rope_theta": 10000.0, **SCALINGS[scaling]}
    if "long_factor" in parameters:
        parameters |= {name: values[:4] for name, values in FACTORS.items()}
    model = tiny(kind, max_position_embeddings=ORIGINAL, rope_parameters=parameters, **own)
    return model, LengthRope.of(model)


@pytest.mark.parametrize("kind", ["llama", "cohere"])
@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_each_token_has_the_frequencies_of_its_length(kind, scaling):
    model, rope = rope_of(scaling, kind)
    assert (rope.kind, rope.steady) == (scaling, ORIGINAL)
    module = model.model.rotary_emb
    x = torch.zeros(1, 1, 1)
    tokens = [(0, 1), (63, 64), (64, 65), (3, 65), (0, 200), (150, 200), (5, 64), (200, 201), (5, 10)]
    at = torch.tensor([[position for position, _ in tokens]])
    lengths = torch.tensor([length for _, length in tokens])
    with rope.step(lengths):
        batched = module(x, at)
    assert "forward" not in module.__dict__
    for i, (position, length) in enumerate(tokens):
        fresh = type(module)(model.config)
        expected = fresh(x, torch.tensor([[position, length - 1]]))
        for found, own in zip(batched, expected, strict=True):
            torch.testing.assert_close(found[:, i], own[:, 0], rtol=0, atol=1e-6)
    short, long = (own for own in (batched[0][0, 6], module(x, torch.tensor([[5, 200]]))[0][0, 0]))
    assert not torch.allclose(short, long, atol=1e-3), "the test would not notice"


def test_a_type_of_layers_keeps_its_own_frequencies():
    scaled = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    model = tiny("gemma3_text", rope_parameters={"full_attention": scaled, "sliding_attention": plain})
    rope, module = LengthRope.of(model), model.model.rotary_emb
    x, at = torch.zeros(1, 1, 1), torch.tensor([[5, 300]])
    local = module(x, at, "sliding_attention")
    with rope.step(torch.tensor([128, 301])):
        torch.testing.assert_close(module(x, at, "sliding_attention"), local)
        full = module(x, at, layer_type="full_attention")
    fresh = type(module)(model.config)
    torch.testing.assert_close(full[0][:, 1], fresh(x, at, "full_attention")[0][:, 1])
    fresh = type(module)(model.config)
    torch.testing.assert_close(full[0][:, 0], fresh(x, at[:, :1], "full_attention")[0][:, 0])


def test_lengths_of_a_step():
    _, dynamic = rope_of("dynamic")
    _, longrope = rope_of("longrope")
    step = {"computed": [0, 99], "counts": [3, 2], "prompts": [70, 100], "totals": [70, 101]}
    assert dynamic.lengths(**step).tolist() == [70, 70, 70, 100, 101]
    assert longrope.lengths(**step).tolist() == [70, 70, 70, 101, 101]
    for rope in (dynamic, longrope):
        assert rope.fixed().lengths(**step).tolist() == [64] * 5
        assert not rope.fixed().stale(65)
        assert rope.fixed().salt(100, 200, 0) == b""
    assert [longrope.stale(total) for total in (64, 65, 66)] == [False, True, False]
    assert not any(dynamic.stale(total) for total in (64, 65, 66))


@given(
    first=st.integers(1, 200),
    second=st.integers(1, 200),
    outputs=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    page=st.integers(0, 12),
    scaling=st.sampled_from(["dynamic", "longrope"]),
)
def test_pages_have_one_salt_only_if_their_frequencies_are_the_same(first, second, outputs, page, scaling):
    rope = LengthRope(scaling, ORIGINAL, [])
    size, start = 16, page * 16
    totals = [prompt + more for prompt, more in zip((first, second), outputs, strict=True)]
    if min(totals) < start + size:
        return

    def lengths(prompt, total):
        found = rope.lengths([start], [size], [prompt], [total]).tolist()
        return [length > ORIGINAL for length in found] if scaling == "longrope" else found

    salts = [rope.salt(prompt, total, start) for prompt, total in zip((first, second), totals, strict=True)]
    same = lengths(first, totals[0]) == lengths(second, totals[1])
    assert (salts[0] == salts[1]) == same


def test_plain_models_have_no_frequencies_by_length():
    for kind in ("llama", "gemma3_text", "gpt2"):
        assert LengthRope.of(tiny(kind)) is None
    assert rope_of("yarn")[1] is None


def test_modules_that_compute_something_else_are_refused():
    model, _ = rope_of("dynamic")
    module = model.model.rotary_emb
    module.attention_scaling = 1.5
    own = module.forward
    module.forward = lambda x, at: tuple(part * 2 for part in own(x, at))
    with pytest.raises(UnsupportedError, match="LlamaRotaryEmbedding does not compute dynamic as"):
        LengthRope.of(model)
    model, _ = rope_of("dynamic")
    del model.config.rope_parameters["factor"]
    with pytest.raises(UnsupportedError, match="KeyError"):
        LengthRope.of(model)


def test_a_models_own_state_is_left_fresh():
    model, _ = rope_of("dynamic")
    module, x = model.model.rotary_emb, torch.zeros(1, 1, 1)
    fresh = type(module)(model.config)
    module(x, torch.tensor([[900]]))
    LengthRope.of(model)
    for at in ([[3, 63]], [[99]]):
        torch.testing.assert_close(module(x, torch.tensor(at)), fresh(x, torch.tensor(at)), rtol=0, atol=0)
