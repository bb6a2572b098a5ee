"""Angles from a table are those that transformers computes, to the last bit, also after it has grown."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from server.models.quantized.rotary import RotaryTable

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
PLAIN = {"rope_type": "default", "rope_theta": 1e5}


@pytest.mark.parametrize("parameters", [PLAIN, YARN], ids=lambda parameters: parameters["rope_type"])
def test_a_table_equals_transformers(parameters):
    config = LlamaConfig(
        hidden_size=48, num_attention_heads=4, max_position_embeddings=512, rope_parameters=parameters
    )
    rotary = LlamaRotaryEmbedding(config)
    table = RotaryTable(rotary.inv_freq, rotary.attention_scaling)
    assert (rotary.attention_scaling == 1.0) == (parameters is PLAIN)
    # In order, out of order, beyond what is there by one, far beyond it, and back.
    for positions in ([0, 1, 2], [7, 3, 2047, 3], [2048], [100_000, 5], [4096], []):
        at = torch.tensor(positions, dtype=torch.int64)
        angles = table.at(at)
        assert angles.positions is not None
        assert len(angles.cosines) == len(angles.sines) > max(positions, default=0)
        for ours, theirs in zip(angles.by_token(), rotary(torch.empty(0), at[None]), strict=True):
            assert torch.equal(ours, theirs)


def test_a_table_is_kept_while_it_reaches_far_enough():
    table = RotaryTable(torch.tensor([1.0, 0.5]), 1.0)
    first = table.at(torch.tensor([3]))
    assert table.at(torch.tensor([1000])).cosines is first.cosines
    assert table.at(torch.tensor([5000])).cosines is not first.cosines


def test_positions_that_are_not_contiguous():
    table = RotaryTable(torch.tensor([1.0]), 1.0)
    angles = table.at(torch.arange(10)[::3])
    assert angles.positions is not None
    assert angles.positions.is_contiguous()
    assert angles.positions.tolist() == [0, 3, 6, 9]
