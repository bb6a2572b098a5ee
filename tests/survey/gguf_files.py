"""Llama models as GGUF files of every kind of block, written with the field's own library."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from tests.models.gguf.files import RANDOM, WIDE, rewrite, write
from tests.models_zoo import save_tiny

_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}


def _write(
    folder: Path,
    kind: Kind,
    *,
    model_type: str = "llama",
    files: int = 1,
    metadata: dict[str, Any] | None = None,
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
    wide = {"hidden_size": WIDE, "intermediate_size": WIDE, "head_dim": 64} if kind in RANDOM else {}
    save_tiny(model_type, source, **wide, **config)
    plain = write(source, folder.parent / "plain.gguf", "llama", metadata)
    weights = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(plain).tensors}
    kinds = {name: kind for name, weight in weights.items() if weight.ndim == 2}
    whole = rewrite(plain, folder.parent / "whole.gguf", tensors=tensors, kinds=kinds)
    rewrite(plain, folder / "model.gguf", tensors=tensors, kinds=kinds, parts=files)
    return _model(source, whole)


def _model(source: Path, file: Path) -> Any:
    """The model in ``source`` with the numbers of the file in place of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    )
    config = model.config
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = stored[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".q_proj." in name or ".k_proj." in name:  # files keep both halves of a rotary head in turn
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            numbers = numbers.reshape(heads, -1, 2, *parameter.shape[1:]).swapaxes(1, 2)
        parameter.data = torch.from_numpy(np.ascontiguousarray(numbers)).reshape(parameter.shape)
    return model


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
    *RANDOM,
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
    (
        "GGUF, linear RoPE",
        partial(_plain, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    ),
    ("GGUF, yarn RoPE", partial(_plain, rope_parameters={**_ROPE, "rope_type": "yarn", "factor": 4.0})),
    (
        "GGUF, llama3 RoPE (rope_freqs.weight)",
        partial(
            _plain,
            rope_parameters={
                **_ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
    ),
    (
        "GGUF, a window (Mistral)",
        partial(_plain, model_type="mistral", sliding_window=48, metadata={"attention.sliding_window": 48}),
    ),
    ("GGUF, an unknown key", partial(_plain, metadata={"something_new": 1}), "something_new"),
    (
        "GGUF, an unknown tensor",
        partial(_plain, tensors={"blk.0.new.weight": _NUMBERS}),
        r"blk\.0\.new",
    ),
)
