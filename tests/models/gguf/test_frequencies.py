import pytest
import torch
import transformers
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.models.gguf.llama3 import recover_llama3
from tests.models.gguf.files import frequency_factors


def config_with(base, size, **rope):
    return transformers.AutoConfig.for_model(
        "llama",
        hidden_size=size,
        num_attention_heads=1,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_type": "llama3", "rope_theta": base, **rope},
    )


def frequencies(config):
    return ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]


def test_published_parameters_are_found_again():
    for factor in (8.0, 32.0):  # Llama 3.1 and 3.2
        rope = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = config_with(500000.0, 64, **rope)
        factors = torch.from_numpy(frequency_factors(config.to_dict()))
        assert recover_llama3(factors, 500000.0) == {"rope_type": "llama3", **rope}


@settings(max_examples=60, deadline=None)
@given(
    base=st.sampled_from([10000.0, 500000.0, 1e6]),
    size=st.sampled_from([8, 16, 64, 80, 128]),
    factor=st.integers(2, 64),
    low=st.floats(0.5, 3),
    ratio=st.floats(1.5, 16),
    original=st.integers(512, 65536),
)
def test_other_parameters_give_the_same_frequencies(base, size, factor, low, ratio, original):
    config = config_with(
        base,
        size,
        factor=float(factor),
        low_freq_factor=low,
        high_freq_factor=low * ratio,
        original_max_position_embeddings=original,
    )
    factors = torch.from_numpy(frequency_factors(config.to_dict()))
    found = recover_llama3(factors, base)
    event("kept as a list of factors" if found is None else "recovered")
    if found is not None:
        again = config_with(base, size, **{name: found[name] for name in found if name != "rope_type"})
        torch.testing.assert_close(frequencies(again), frequencies(config), rtol=1e-5, atol=0)


def test_unusual_parameters_are_recovered():
    for low, high, original in ((1.5, 7.0, 100), (1.0, 3.0, 5000), (2.5, 10.0, 40000)):
        config = config_with(
            10000.0,
            128,
            factor=5.5,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=original,
        )
        found = recover_llama3(torch.from_numpy(frequency_factors(config.to_dict())), 10000.0)
        assert found is not None
        length = found["original_max_position_embeddings"]
        assert length / found["low_freq_factor"] == pytest.approx(original / low, rel=1e-3)
        assert length / found["high_freq_factor"] == pytest.approx(original / high, rel=1e-3)


def test_factors_of_another_kind_are_not_taken_for_these():
    assert recover_llama3(torch.tensor([1.0, 3.0, 2.0, 8.0]), 10000.0) is None
    assert recover_llama3(torch.tensor([0.5, 1.0, 2.0, 8.0]), 10000.0) is None
