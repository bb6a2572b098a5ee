"""Weights that were published in blocks of few bits are the very same when packed."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.models.lay_out import lay_out
from server.models.load import load_model
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.model import QuantizedModel
from server.models.quantized.packing import GROUP, pack, pack_exactly
from tests.engine.harness import load
from tests.gguf_blocks import as_published, published
from tests.instructions import at, every_level
from tests.models.test_fuse import logits_of
from tests.models_zoo import VOCABULARY, save_tiny

TOKENS = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))

# The fewest bits that hold a block type's weights exactly, if any do.
BITS = {"Q4_0": 4, "Q4_1": 4, "TQ2_0": 4, "Q8_0": 8, "Q5_0": 8, "MXFP4": 8, "IQ4_NL": 8, "Q3_K": 8}
NOT_EXACT = ("Q5_1", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "F32", "F16", "BF16")


def operators(packed, outputs, inputs):
    """The weights as the operator multiplies them, one at a time."""
    return QuantizedLinear(packed, inputs, outputs, None)(torch.eye(inputs)).T


@pytest.mark.parametrize(("name", "bits"), BITS.items())
def test_blocks_that_have_an_exact_form(name, bits):
    weight = published(name)
    if bits == 8:
        assert pack_exactly(weight, 4) is None
    packed = pack_exactly(weight, bits)
    assert torch.equal(operators(packed, *weight.shape), weight)
    changed = weight.clone()
    changed[30, 100] = changed[30, 100].nextafter(torch.tensor(1.0))
    assert pack_exactly(changed, bits) is None


@pytest.mark.parametrize("name", NOT_EXACT)
def test_blocks_that_have_none(name):
    weight = published(name)
    assert pack_exactly(weight, 4) is pack_exactly(weight, 8) is None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e9])
@pytest.mark.parametrize("bits", [4, 8])
def test_non_finite_or_too_large_weights_are_not_exact(bits, wrong):
    weight = torch.zeros(16, 64)
    weight[5, 40] = wrong
    assert pack_exactly(weight, bits) is None
    assert pack_exactly(torch.full((16, 64), wrong), bits) is None


numbers16 = st.integers(0, (1 << 16) - 1).filter(lambda bits: bits & 0x7C00 != 0x7C00)


def half(bits):
    return np.array([bits], np.uint16).view(np.float16).astype(np.float32)


def codes(least, most):
    """A group's, of which some or all may be missing: at the ends, between, all but one."""
    some = st.lists(st.integers(least, most), min_size=1, max_size=16)
    return some.flatmap(lambda chosen: st.lists(st.sampled_from(chosen), min_size=GROUP, max_size=GROUP))


@settings(max_examples=100, deadline=None)
@given(numbers16, codes(0, 15))
def test_any_group_of_q4_0(scale, group):
    """With any scale: negative, 0, subnormal, so large that eight of it are beyond float16."""
    weight = torch.from_numpy(half(scale) * (np.array([group], np.float32) - 8))
    packed = pack_exactly(weight, 4)
    if packed is None:
        assert abs(half(scale)) > 8188
        packed = pack_exactly(weight, 8)
    assert torch.equal(operators(packed, 1, GROUP), weight)


@settings(max_examples=100, deadline=None)
@given(numbers16, st.floats(-100, 100), codes(0, 15).filter(lambda group: len(set(group)) > 1))
def test_any_group_of_q4_1(scale, offset, group):
    """As long as the offset is not so large that it hides the codes."""
    scale = half(scale)
    offset = np.clip(offset * scale, -6e4, 6e4).astype(np.float16).astype(np.float32)
    weight = torch.from_numpy(scale * np.array([group], np.float32) + offset)
    assert torch.equal(operators(pack_exactly(weight, 4), 1, GROUP), weight)


@settings(max_examples=100, deadline=None)
@given(numbers16, codes(-128, 127))
def test_any_group_of_8_bits(scale, group):
    weight = torch.from_numpy(half(scale) * np.array([group], np.float32))
    assert torch.equal(operators(pack_exactly(weight, 8), 1, GROUP), weight)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([4, 8]), st.lists(numbers16, min_size=GROUP, max_size=GROUP))
def test_weights_said_to_be_exact_are(bits, group):
    weight = torch.from_numpy(np.concatenate([half(number) for number in group])[None])
    packed = pack_exactly(weight, bits)
    assert packed is None or torch.equal(operators(packed, 1, GROUP), weight)


@every_level
def test_every_level_finds_the_same(level):
    weights = {name: published(name, 20, 256) for name in BITS}
    here = {name: pack_exactly(weight, BITS[name]) for name, weight in weights.items()}
    with at(level):
        for name, weight in weights.items():
            found = pack_exactly(weight, BITS[name])
            assert torch.equal(found.codes, here[name].codes)
            assert torch.equal(found.scales, here[name].scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_that_reach_the_extremes_come_first(bits):
    """They are what rounding gives."""
    weight = published({4: "Q4_1", 8: "Q8_0"}[bits])
    packed, rounded = pack_exactly(weight, bits), pack(weight, bits)
    assert torch.equal(packed.codes, rounded.codes)
    assert torch.equal(packed.scales, rounded.scales)


MERGED = {
    **dict.fromkeys(["q_proj", "k_proj", "v_proj"], "qkv"),
    **dict.fromkeys(["gate_proj", "up_proj"], "gate_up"),
    "o_proj": "o",
    "down_proj": "down",
}


def publish(folder, types):
    """A small model whose matrices have these block types' values.

    Args:
        folder: where to write it.
        types: of the linear layers by their names after fusing.
    """
    loaded = load_model(save_tiny("llama", folder), "float32", "cpu", None, lambda *_: None)
    for name, linear in loaded.model.named_modules():
        part = name.rpartition(".")[2]
        if block := types.get(MERGED.get(part, part)):
            linear.weight.data.copy_(as_published(linear.weight.data, block))
    return loaded


@pytest.mark.parametrize(
    ("types", "forms", "head", "said"),
    [
        (
            dict.fromkeys(["qkv", "o", "gate_up", "down", "lm_head"], "Q4_0"),
            "int4",
            "int4",
            ["9 packed in 4 bits"],
        ),
        (
            dict.fromkeys(["qkv", "o", "gate_up", "down", "lm_head"], "Q8_0"),
            "int8",
            "int8",
            ["9 packed in 8 bits"],
        ),
        ({}, "float32", "float32", ["9 left in float32", "--weights int8 rounds them"]),
        (
            {"qkv": "Q4_0", "o": "Q8_0", "gate_up": "Q4_1", "down": "Q5_0", "lm_head": "Q8_0"},
            "int4+int8",
            "int8",
            ["4 packed in 4 bits, 5 packed in 8 bits"],
        ),
        (
            {"qkv": "Q5_1", "o": "Q4_0", "gate_up": "Q4_1", "down": "Q5_0", "lm_head": "Q8_0"},
            "float32+int4+int8",
            "int8",
            ["4 packed in 4 bits, 3 packed in 8 bits, 2 left in float32, as groups of 32"],
        ),
        (
            dict.fromkeys(["qkv", "o", "gate_up", "down"], "Q4_0"),
            "int4",
            "float32",
            ["8 packed in 4 bits, 1 left in float32"],
        ),
    ],
    ids=["Q4_0", "Q8_0", "floats", "both", "mixed", "head apart"],
)
def test_auto_packs_exact_weights_and_names_the_others(types, forms, head, said, tmp_path, caplog):
    loaded = publish(tmp_path / "llama", types)
    plain = logits_of(loaded.model, TOKENS)
    with caplog.at_level(logging.INFO, "longspan.models"):
        served, found, _ = lay_out(loaded, "auto", lambda _: None)
    assert found == forms
    assert isinstance(served.model, QuantizedModel) == ("float32" not in forms)
    (line,) = (text for text in caplog.messages if text.startswith("weights are"))
    assert line.startswith(f"weights are {forms}, those of the output layer {head}: of its linear layers")
    assert all(part in line for part in said)
    error = (logits_of(served.model, TOKENS) - plain).square().mean(-1).sqrt() / plain.std(-1)
    assert float(error.median()) < 0.05
    assert bool(error.any()) == bool(types)


def test_rounded_layers_and_those_never_packed_are_named(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "longspan.models"):
        load(save_tiny("mixtral", tmp_path / "mixtral"), weights="int8")
    (line,) = (text for text in caplog.messages if text.startswith("weights are"))
    assert "9 packed in 8 bits, 9 of these rounded, never packed: MixtralExperts" in line
