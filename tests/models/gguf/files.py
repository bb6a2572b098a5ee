"""GGUF files of tiny models, written by llama.cpp's conventions with the names of the gguf package."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

INTERLEAVED = ("llama", "mistral3", "granite", "smollm3")
PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
# Blocks that the library reads and does not write: bytes of each, and by their places the scales of 16 bits
# with which random bytes give numbers around 0 of about 0.1.
RANDOM: dict[gguf.GGMLQuantizationType, tuple[int, dict[int, float]]] = {
    gguf.GGMLQuantizationType.Q2_K: (84, {80: 0.01, 82: 0.015}),
    gguf.GGMLQuantizationType.Q3_K: (110, {108: 0.0025}),
    gguf.GGMLQuantizationType.Q4_K: (144, {0: 0.0006, 2: 0.0045}),
    gguf.GGMLQuantizationType.Q5_K: (176, {0: 0.00025, 2: 0.0039}),
    gguf.GGMLQuantizationType.Q6_K: (210, {208: 0.00008}),
}
WIDE = 256
"""The numbers of such a block."""
_ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def write(folder: Path, file: Path, architecture: str, more: dict[str, Any] | None = None) -> Path:
    """The model in ``folder`` as a GGUF file.

    Args:
        folder: a Hugging Face folder with a byte-level tokenizer.
        file: where to write.
        architecture: as GGUF files call it.
        more: keys without the architecture's name, beyond those that all architectures have.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {**_keys(config), **(more or {})}.items():
        add_key(writer, f"{architecture}.{key}", value)
    _add_tokenizer(writer, folder)
    for name, data in sorted(_tensors(folder, architecture, config).items()):
        writer.add_tensor(name, np.ascontiguousarray(data, dtype=np.float32))
    return close(writer, file)


def rewrite(
    source: Path,
    file: Path,
    *,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    parts: int = 1,
) -> Path:
    """A GGUF file with some keys and tensors in place of its own; ``None`` leaves one out.

    Args:
        source: the file to start from.
        file: where to write; of several files, what their names are made of.
        keys: by their whole names.
        tensors: arrays by name.
        kinds: how to store tensors, by name.
        parts: how many files to write.
    """
    reader = gguf.GGUFReader(source)
    old = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    most = -(-len(reader.tensors) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(file, old.pop("general.architecture"), split_max_tensors=most)
    for key, value in {**old, **(keys or {})}.items():
        if value is not None and value != []:
            add_key(writer, key, value)
    data = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, array in {**data, **(tensors or {})}.items():
        if array is not None:
            kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
            writer.add_tensor(name, blocks(array, kind), raw_dtype=kind)
    return close(writer, file)


def blocks(weight: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The bytes of a weight, rounded; random ones around 0 where the library can't write the kind."""
    if kind not in RANDOM:
        return gguf.quants.quantize(weight, kind)
    size, scales = RANDOM[kind]
    rows, columns = weight.shape
    random = np.random.default_rng(weight.size).integers(
        0, 256, (rows * columns // WIDE, size), dtype=np.uint8
    )
    for at, scale in scales.items():
        random[:, at : at + 2] = np.full((len(random), 1), scale, np.float16).view(np.uint8)
    return random.reshape(rows, -1)


def close(writer: gguf.GGUFWriter, file: Path) -> Path:
    """Writes what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a value by its Python type."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[list] = writer.add_array
    kinds[type(value)](key, value)


def frequency_factors(config: dict[str, Any]) -> np.ndarray:
    """The divisors of the frequencies in llama3's scaling, from transformers itself."""
    own = AutoConfig.for_model(**config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](own, "cpu")
    size = 2 * len(scaled)
    plain = own.rope_parameters["rope_theta"] ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    return (plain / scaled.double().numpy()).astype(np.float32)


def _keys(config: dict[str, Any]) -> dict[str, Any]:
    def one(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    hidden, heads = one("hidden_size", "n_embd"), one("num_attention_heads", "n_head")
    size = config.get("head_dim") or hidden // heads
    keys = {
        "block_count": one("num_hidden_layers", "n_layer"),
        "context_length": one("max_position_embeddings", "n_positions"),
        "embedding_length": hidden,
        "feed_forward_length": one("intermediate_size") or 4 * hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": one("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": one("rms_norm_eps"),
        "attention.layer_norm_epsilon": one(
            "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"
        ),
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "expert_count": one("num_local_experts", "num_experts"),
        "expert_used_count": one("num_experts_per_tok"),
        "expert_feed_forward_length": one("moe_intermediate_size"),
        "expert_shared_feed_forward_length": one("shared_expert_intermediate_size"),
    }
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    keys |= {
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
    }
    if rope:
        keys["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        keys |= {
            "rope.scaling.type": rope["rope_type"],
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
            "rope.scaling.yarn_attn_factor": rope.get("attention_factor"),
            "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        }
    if rope.get("rope_type") == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = keys["context_length"] / original
        keys["rope.scaling.original_context_length"] = original
        keys["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(factor) / np.log(original)))
    return {key: value for key, value in keys.items() if value is not None}


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index in special else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def _tensors(folder: Path, architecture: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(
        _ARCHITECTURES[architecture], config.get("num_hidden_layers") or config["n_layer"]
    )
    weights = {name: weight.numpy() for name, weight in load_file(folder / "model.safetensors").items()}
    found = {}
    for name, data in _stacked(weights).items():
        for part, piece in _pieces(name, data, architecture, config):
            known = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert known is not None, part
            found[known] = piece
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = frequency_factors(config)
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            found[f"rope_factors_{length}.weight"] = np.array(rope[f"{length}_factor"], dtype=np.float32)
    return found


def _stacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Numbered parts of a layer, experts and norms of heads, as one."""
    whole: dict[str, Any] = {}
    parts: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for name, data in weights.items():
        match = re.fullmatch(r"(.+\.\d+\..+?)\.(?:norms\.)?(\d+)\.(.+)", name)
        if match is None:
            whole[name] = data
        else:
            parts[f"{match[1]}.{match[3]}"][int(match[2])] = data
    return whole | {name: np.stack([each[i] for i in range(len(each))]) for name, each in parts.items()}


def _pieces(
    name: str, data: np.ndarray, architecture: str, config: dict[str, Any]
) -> list[tuple[str, np.ndarray]]:
    if architecture in INTERLEAVED and re.search(r"\.[qk]_proj\.", name):
        heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
    if architecture in PLUS_ONE and name.endswith("norm.weight"):
        data = data + 1
    if architecture == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight", name):
        data = data.T
    if ".query_key_value." in name:
        heads = config["num_attention_heads"]
        data = data.reshape(heads, 3, -1, *data.shape[1:]).swapaxes(0, 1).reshape(data.shape)
    if architecture == "gpt-oss" and ".experts." in name:
        name = re.sub(r"_proj(_bias)?$", lambda match: "_proj.bias" if match[1] else "_proj.weight", name)
        data = data.swapaxes(1, 2) if data.ndim == 3 else data
        if ".gate_up_proj." in name:
            return [
                (name.replace(".gate_up_proj.", f".{part}_proj."), data[:, start::2])
                for start, part in enumerate(("gate", "up"))
            ]
    return [(f"{name}.weight" if name.endswith(".sinks") else name, data)]
