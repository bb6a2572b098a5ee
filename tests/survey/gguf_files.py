"""Llama models as GGUF files of every kind of block, written with the field's own library."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from tests.models_zoo import save_tiny

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Blocks that the library reads and does not write: bytes of each, and by their places the scales of 16 bits
# with which random bytes give numbers around 0 of about 0.1.
_RANDOM: dict[Kind, tuple[int, dict[int, float]]] = {
    Kind.Q2_K: (84, {80: 0.01, 82: 0.015}),
    Kind.Q3_K: (110, {108: 0.0025}),
    Kind.Q4_K: (144, {0: 0.0006, 2: 0.0045}),
    Kind.Q5_K: (176, {0: 0.00025, 2: 0.0039}),
    Kind.Q6_K: (210, {208: 0.00008}),
}
_WIDE = 256  # the numbers of such a block


def _blocks(weight: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    if kind not in _RANDOM:
        return gguf.quants.quantize(np.ascontiguousarray(weight), kind)
    size, scales = _RANDOM[kind]
    rows, columns = weight.shape
    blocks = rng.integers(0, 256, (rows * columns // _WIDE, size), dtype=np.uint8)
    for at, scale in scales.items():
        blocks[:, at : at + 2] = np.full((len(blocks), 1), scale, np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """As the files keep rotary heads of Llama: both halves in turn."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _halved(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _write(
    folder: Path,
    kind: Kind,
    *,
    model_type: str = "llama",
    files: int = 1,
    metadata: dict[str, float | str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    **config: Any,
) -> Any:
    """Writes ``model.gguf`` or its parts, and gives the model of the numbers in it.

    Args:
        folder: where to write.
        kind: of the blocks of all matrices.
        model_type: in transformers; in the file it is llama's.
        files: how many parts.
        metadata: further keys, without the architecture's name.
        tensors: further tensors.
        config: of the model.
    """
    source = folder.parent / "source"
    wide = {"hidden_size": _WIDE, "intermediate_size": _WIDE, "head_dim": 64} if kind in _RANDOM else {}
    save_tiny(model_type, source, **wide, **config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    own_tensors = dict(model.named_parameters())
    writer = gguf.GGUFWriter(
        folder / "model.gguf", "llama", split_max_tensors=-(-len(own_tensors) // files) if files > 1 else 0
    )
    _add_metadata(writer, model.config, metadata or {})
    _add_tokenizer(writer, source)
    rng = np.random.default_rng(0)
    for name, tensor in own_tensors.items():
        heads = next((count for part, count in (("q_proj", 4), ("k_proj", 2)) if part in name), 0)
        weight = tensor.detach().numpy()
        weight = _interleaved(weight, heads) if heads else weight
        own = kind if weight.ndim == 2 else Kind.F32
        blocks = _blocks(weight, own, rng)
        there = name
        for ours, theirs in _NAMES.items():
            there = there.replace(ours, theirs)
        writer.add_tensor(there, blocks, raw_dtype=own)
        exact = gguf.quants.dequantize(blocks, own).reshape(weight.shape).astype(np.float32)
        tensor.data = torch.from_numpy(np.ascontiguousarray(_halved(exact, heads) if heads else exact))
    for name, extra in (tensors or {}).items():
        writer.add_tensor(name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_metadata(writer: gguf.GGUFWriter, config: Any, metadata: dict[str, float | str]) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"llama.{key}", value)


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


def _linear(folder: Path) -> Any:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    return _write(folder, Kind.F32, metadata=metadata, rope_parameters=rope)


def _yarn(folder: Path) -> Any:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    metadata = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    return _write(folder, Kind.F32, metadata=metadata, rope_parameters=rope)


def _llama3(folder: Path) -> Any:
    """Llama 3's stretching, which files hold as one factor for each frequency."""
    factor, low, high, original = 8.0, 1.0, 4.0, 64
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    turns = original * 10000.0 ** -(np.arange(0, 16, 2) / 16) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return _write(folder, Kind.F32, tensors={"rope_freqs.weight": factors}, rope_parameters=rope)


def _part_missing(folder: Path) -> None:
    _write(folder, Kind.F32, files=3)
    next(folder.glob("*-00002-of-*")).unlink()


_KINDS = (
    Kind.F32,
    Kind.F16,
    Kind.BF16,
    Kind.Q4_0,
    Kind.Q4_1,
    Kind.Q5_0,
    Kind.Q5_1,
    Kind.Q8_0,
    *_RANDOM,
)

_plain = partial(_write, kind=Kind.F32)
_NUMBERS = np.ones(4, np.float32)

# By name: what writes a file and gives the model of its numbers, and where it must be refused, the sentence.
FORMS: tuple[tuple[Any, ...], ...] = (
    *((f"GGUF {kind.name}", partial(_write, kind=kind)) for kind in _KINDS),
    ("GGUF, tied embeddings", partial(_plain, tie_word_embeddings=True)),
    ("GGUF in three files", partial(_plain, files=3)),
    ("GGUF, one of three files missing", _part_missing, "-00002-of-00003"),
    ("GGUF, biases of q, k, v and output", partial(_plain, attention_bias=True)),
    ("GGUF, biases of the MLP", partial(_plain, mlp_bias=True)),
    ("GGUF, linear RoPE", _linear),
    ("GGUF, yarn RoPE", _yarn),
    ("GGUF, llama3 RoPE (rope_freqs.weight)", _llama3),
    (
        "GGUF, a window (Mistral)",
        partial(_plain, model_type="mistral", sliding_window=48, metadata={"attention.sliding_window": 48}),
    ),
    ("GGUF, a key that nobody knows", partial(_plain, metadata={"something_new": 1}), "something_new"),
    (
        "GGUF, a tensor that nobody knows",
        partial(_plain, tensors={"blk.0.new.weight": _NUMBERS}),
        r"blk\.0\.new",
    ),
)
