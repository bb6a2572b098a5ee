import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from server.models.gguf.conversion import convert
from server.models.gguf.file import GgufFile
from tests.models.gguf.files import close, rewrite, write
from tests.models.gguf.zoo import CASES, save

_KINDS = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name in ("llama", "llama, biases", "qwen3moe", "phi3"):
        save(CASES[name], folder / name)
        found[name] = write(
            folder / name, folder / f"{name}.gguf", CASES[name].architecture, CASES[name].keys
        )
    return found


def weights_of(file, folder):
    convert(file, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", [_KINDS.Q4_0, _KINDS.Q4_1, _KINDS.Q5_0, _KINDS.Q5_1, _KINDS.Q8_0])
def test_blocks_become_exactly_the_numbers_that_they_stand_for(files, tmp_path, kind):
    name = "blk.1.ffn_up.weight"
    file = rewrite(files["llama"], tmp_path / "x.gguf", kinds={name: kind})
    weights = weights_of(file, tmp_path / "x")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    own = load_file(files["llama"].parent / "llama" / "model.safetensors")[
        "model.layers.1.mlp.up_proj.weight"
    ]
    expected = gguf.quants.dequantize(gguf.quants.quantize(own.numpy(), kind), kind)
    assert np.array_equal(weights["model.layers.1.mlp.up_proj.weight"].numpy(), expected)


# One block of each type, by hand from ggml's definitions, and the number that all of its codes stand for.
_HALF = np.array([0.5], np.float16).tobytes()
_SCALES_3_MINIMA_1 = bytes([3] * 4 + [1] * 4 + [0x13] * 4)
_BLOCKS = {
    _KINDS.Q4_K: (_HALF + _HALF + _SCALES_3_MINIMA_1 + bytes([0x55]) * 128, 0.5 * 3 * 5 - 0.5 * 1),
    _KINDS.Q5_K: (
        _HALF + _HALF + _SCALES_3_MINIMA_1 + bytes([0xFF]) * 32 + bytes([0x55]) * 128,
        0.5 * 3 * (16 + 5) - 0.5 * 1,
    ),
    _KINDS.Q6_K: (
        bytes([0x22]) * 128 + bytes([0xFF]) * 64 + bytes([2]) * 16 + _HALF,
        0.5 * 2 * (3 * 16 + 2 - 32),
    ),
    _KINDS.MXFP4: (bytes([128]) + bytes([0x22]) * 16, 2.0 * 1.0),
}


@pytest.mark.parametrize("kind", _BLOCKS)
def test_larger_blocks_are_decoded(tmp_path, kind):
    block, number = _BLOCKS[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", np.frombuffer(block, np.uint8).reshape(1, -1), raw_dtype=kind)
    values = GgufFile(close(writer, tmp_path / "x.gguf")).take("x")
    assert values.shape == (1, 32 if kind == _KINDS.MXFP4 else 256)
    assert set(values.flatten().tolist()) == {number}


@pytest.mark.parametrize(("kind", "dtype"), [(_KINDS.F16, torch.float16), (_KINDS.BF16, torch.bfloat16)])
def test_16_bits_stay_where_the_rest_of_the_file_fits_them(files, tmp_path, kind, dtype):
    reader = gguf.GGUFReader(files["llama"])
    matrices = {tensor.name: kind for tensor in reader.tensors if len(tensor.shape) > 1}
    norms = {tensor.name: np.ones(32, np.float32) for tensor in reader.tensors if len(tensor.shape) == 1}
    weights = weights_of(
        rewrite(files["llama"], tmp_path / "a.gguf", kinds=matrices, tensors=norms), tmp_path / "a"
    )
    assert {weight.dtype for weight in weights.values()} == {dtype}
    own = load_file(files["llama"].parent / "llama" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], own["lm_head.weight"].to(dtype))
    norms["output_norm.weight"] = np.full(32, 1 / 3, np.float32)
    weights = weights_of(
        rewrite(files["llama"], tmp_path / "b.gguf", kinds=matrices, tensors=norms), tmp_path / "b"
    )
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert weights["model.norm.weight"][0] == np.float32(1 / 3)


def test_norms_in_16_bits_that_lose_their_one_are_exact(tmp_path):
    save(CASES["gemma"], tmp_path / "gemma")
    file = write(tmp_path / "gemma", tmp_path / "gemma.gguf", "gemma")
    data = {name: array.astype(np.float16).astype(np.float32) for name, array in data_of(file).items()}
    data["output_norm.weight"][:] = np.float16(1e-3)
    kinds = dict.fromkeys(data, gguf.GGMLQuantizationType.F16)
    weights = weights_of(rewrite(file, tmp_path / "a.gguf", tensors=data, kinds=kinds), tmp_path / "a")
    assert weights["model.norm.weight"].dtype == torch.float32
    assert weights["model.norm.weight"][0] == np.float32(np.float16(1e-3)) - np.float32(1)


def data_of(file):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def test_queries_keys_and_values_can_be_merged_or_apart(files, tmp_path):
    for name in ("llama", "llama, biases"):
        data = data_of(files[name])
        changes = {}
        for layer in range(2):
            for kind in ("weight", "bias"):
                parts = [f"blk.{layer}.attn_{part}.{kind}" for part in "qkv"]
                if parts[0] in data:
                    changes[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate([data[part] for part in parts])
                    changes |= dict.fromkeys(parts)
        merged = weights_of(rewrite(files[name], tmp_path / "x.gguf", tensors=changes), tmp_path / "x")
        own = load_file(files[name].parent / name / "model.safetensors")
        assert all(torch.equal(merged[each], own[each]) for each in own)
        assert merged.keys() == own.keys()

    data, changes = data_of(files["phi3"]), {}
    for layer in range(2):
        changes[f"blk.{layer}.attn_qkv.weight"] = None
        rows = np.split(data[f"blk.{layer}.attn_qkv.weight"], [32, 48])
        changes |= {f"blk.{layer}.attn_{part}.weight": row for part, row in zip("qkv", rows, strict=True)}
    apart = weights_of(rewrite(files["phi3"], tmp_path / "y.gguf", tensors=changes), tmp_path / "y")
    own = load_file(files["phi3"].parent / "phi3" / "model.safetensors")
    assert all(torch.equal(apart[each], own[each]) for each in own)


def test_gates_of_experts_can_be_merged_with_what_they_gate(files, tmp_path):
    data, changes = data_of(files["qwen3moe"]), {}
    for layer in range(2):
        parts = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        changes[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(
            [data[part] for part in parts], axis=1
        )
        changes |= dict.fromkeys(parts)
    merged = weights_of(rewrite(files["qwen3moe"], tmp_path / "x.gguf", tensors=changes), tmp_path / "x")
    own = load_file(files["qwen3moe"].parent / "qwen3moe" / "model.safetensors")
    assert merged.keys() == own.keys()
    assert all(torch.equal(merged[each], own[each]) for each in own)


def test_a_bias_that_is_missing_beside_others_is_zero(files, tmp_path):
    name = "blk.1.attn_output.bias"
    file = rewrite(files["llama, biases"], tmp_path / "x.gguf", tensors={name: None})
    weights = weights_of(file, tmp_path / "x")
    assert not weights["model.layers.1.self_attn.o_proj.bias"].any()
    assert weights["model.layers.0.self_attn.o_proj.bias"].any()


def test_weights_are_written_in_shards_where_they_are_many(files, tmp_path, monkeypatch):
    monkeypatch.setattr("server.models.gguf.writing._SHARD", 50_000)
    convert(files["qwen3moe"], tmp_path / "x")
    shards = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    own = load_file(files["qwen3moe"].parent / "qwen3moe" / "model.safetensors")
    found = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[each], own[each]) for each in own)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(info.values()), info
