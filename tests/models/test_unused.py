from pathlib import Path

import pytest
import transformers

from server.errors import RefusedError
from server.models.checkpoint.files import Stored
from server.models.checkpoint.reading import Reading
from server.models.checkpoint.unused import layer_beyond, reason_unused
from server.models.checkpoint.weights import check_read


def config(**values):
    return transformers.LlamaConfig(num_hidden_layers=4, **values)


def unused(name, shape=(4,), dropped=False, **values):
    return reason_unused(name, Stored(Path(), "F32", shape), config(**values), dropped=dropped)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vision_tower.encoder.layers.9.mlp.fc1.weight", "images"),
        ("model.visual.blocks.0.attn.qkv.bias", "images"),
        ("model.multi_modal_projector.linear_1.weight", "images"),
        ("audio_tower.conv1.weight", "sound"),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", "rotary frequencies"),
        ("transformer.h.0.self_attention.maybe_rotary.inv_freq", "rotary frequencies"),
        ("transformer.rotary_pos_emb.inv_freq", "rotary frequencies"),
        ("mtp.fc.weight", "further tokens"),
        ("model.mtp_block.0.mlp.up_proj.weight", "further tokens"),
        ("model.layers.0.self_attn.k_proj.k_scale", "KV cache"),
        ("model.layers.0.self_attn.kv_scale", "KV cache"),
    ],
)
def test_tensors_known_to_be_unused_have_a_reason(name, reason):
    assert reason in unused(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.visualizer.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.inv_freq.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq.weight",
        "model.layers.4.mlp.up_proj.weight",
        "model.layers.3.self_attn.k_proj.weight",
    ],
)
def test_unknown_tensors_have_none(name):
    assert unused(name) is None


@pytest.mark.parametrize(
    ("shape", "is_mask"),
    [((1, 1, 64, 64), True), ((), True), ((1,), True), ((64,), False), ((1, 1, 64, 32), False)],
)
def test_masks_are_told_from_biases_by_their_shape(shape, is_mask):
    for name in ("transformer.h.0.attn.bias", "transformer.h.0.attn.attention.masked_bias"):
        assert (unused(name, shape) is not None) == is_mask


def test_layers_behind_the_last_predict_further_tokens_only_as_many_as_are_said():
    name = "model.layers.{}.mlp.up_proj.weight"
    assert unused(name.format(4), num_nextn_predict_layers=1)
    assert not unused(name.format(5), num_nextn_predict_layers=1)
    assert unused(name.format(5), num_nextn_predict_layers=2)
    assert unused(name.format(4), dropped=True)
    assert not unused(name.format(5), dropped=True)
    assert [layer_beyond(name.format(n), config()) for n in (0, 3, 4, 12)] == [None, None, 4, 12]


def test_keys_of_layers_that_share_another_s_are_unused():
    assert unused("model.layers.3.self_attn.k_proj.weight", num_kv_shared_layers=1)
    assert not unused("model.layers.2.self_attn.k_proj.weight", num_kv_shared_layers=1)
    assert not unused("model.layers.3.self_attn.q_proj.weight", num_kv_shared_layers=1)


def test_a_version_of_transformers_that_reads_in_another_way_is_noticed(tmp_path):
    stored = {"lm_head.weight": Stored(tmp_path, "F32", (4,))}
    with pytest.raises(RefusedError, match=r"read other tensors than .* lm_head\.weight among them"):
        check_read(None, Reading(), stored, tmp_path, None)
