"""A GGUF file of a small Llama with random weights, made by gguf's own writer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from tests.gguf_blocks import blocks
from tests.models_zoo import VOCABULARY, _tokenizer

_SIZE, _INNER, _HEADS, _KV_HEADS, _LAYERS = 256, 512, 4, 2, 2


def write_llama(target: Path, embedding: str = "F32") -> Path:
    """Writes it, with all weights in float32 but those of the embedding.

    Args:
        target: the file.
        embedding: a type of GGUF's blocks, or F16, BF16, F32.
    """
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(_SIZE)
    writer.add_feed_forward_length(_INNER)
    writer.add_block_count(_LAYERS)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_SIZE // _HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCABULARY)
    _add_tokenizer(writer)
    raw = blocks(embedding, VOCABULARY, _SIZE)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType[embedding])

    def matrix(name: str, outputs: int, inputs: int) -> None:
        weights = 0.15 * random.standard_normal((outputs, inputs))
        writer.add_tensor(f"{name}.weight", weights.astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", (1 + 0.1 * random.standard_normal(_SIZE)).astype(np.float32))

    for layer in range(_LAYERS):
        for name, outputs, inputs in (
            ("attn_q", _SIZE, _SIZE),
            ("attn_k", _SIZE * _KV_HEADS // _HEADS, _SIZE),
            ("attn_v", _SIZE * _KV_HEADS // _HEADS, _SIZE),
            ("attn_output", _SIZE, _SIZE),
            ("ffn_gate", _INNER, _SIZE),
            ("ffn_up", _INNER, _SIZE),
            ("ffn_down", _SIZE, _INNER),
        ):
            matrix(f"blk.{layer}.{name}", outputs, inputs)
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
    norm("output_norm")
    matrix("output", VOCABULARY, _SIZE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    model = json.loads(_tokenizer())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    control = ("<|text|>", "<|start|>", "<|end|>")
    kinds = [gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokens.index("<|text|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
