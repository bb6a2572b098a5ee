"""A file's metadata as a config of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import transformers

from server.errors import quoted
from server.models.gguf.reading import Reading
from server.models.gguf.rope import read_rope
from server.models.gguf.row import Row
from server.models.gguf.transforms import Sizes
from server.models.gguf.windows import read_window

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NO_POOLING = 0


class Described(NamedTuple):
    """The contents of the metadata.

    Attributes:
        config: of transformers.
        sizes: for transforms.
        drafting: further layers in the file, which predict several tokens at once.
    """

    config: Any
    sizes: Sizes
    drafting: int


def read_config(reading: Reading, row: Row, generation: Mapping[str, Any]) -> Described:
    """Reads every key that the architecture computes with.

    Args:
        reading: the file's metadata.
        row: of its architecture.
        generation: the model's generation config, which has the tokens that begin, end and fill up texts.

    Raises:
        ValueError: a key is missing, or says what the architecture of transformers can't compute.
    """
    _check_kind(reading)
    values = {name: reading.get(key) for key, name in row.keys.items()}
    drafting = int(reading.get("nextn_predict_layers", 0))
    layers = values[row.keys["block_count"]] = values[row.keys["block_count"]] - drafting
    count = sum(1 for _ in reading.file)
    if layers > count:
        raise ValueError(f"it says that it has {layers} layers, but it has only {count} tensors")
    if not any(name.startswith(f"blk.{layers - 1}.") for name in reading.file):
        raise ValueError(f"it says that it has {layers} layers, but it has no tensor of the last of them")
    hidden, heads = values[row.keys["embedding_length"]], values[row.keys["attention.head_count"]]
    sizes = _read_sizes(reading, row, hidden, heads)
    if row.kv_heads:
        values["num_key_value_heads"] = sizes.kv_heads
    if row.head_size is not None:
        values[row.head_size] = sizes.head_size
    values["vocab_size"] = _vocabulary(reading)
    values["tie_word_embeddings"] = "output.weight" not in reading.file
    values |= read_window(reading, row.window, layers)
    for flag, stems in row.biases.items():
        values[flag] = any(has_bias(reading, stem) for stem in stems)
    values |= row.fixed
    values |= row.more(reading, values)
    known = transformers.AutoConfig.for_model(row.model_type)
    if row.rope is not None:
        context = values[row.keys["context_length"]]
        rope = read_rope(
            reading, sizes.head_size, context, partial=row.rope == "partial", truncate=row.truncate
        )
        rope |= {name: reading.get(key) for key, name in row.rope_keys.items()}
        if _is_by_layer(known):
            values["rope_parameters"] = _by_layer(reading, row, rope)
        else:
            values["rope_parameters"] = rope
            reading.expect("rope.freq_base_swa", rope["rope_theta"])
    values |= {name: generation.get(name) for name in _TOKENS}
    # Some configs take the size of a head without declaring it; it shows in the shapes.
    if strange := [name for name in values if name != row.head_size and not hasattr(known, name)]:
        raise ValueError(
            f"{row.model_type} of transformers {transformers.__version__} has no {strange[0]}; upgrade it"
        )
    try:
        config = transformers.AutoConfig.for_model(row.model_type, **values)
    except Exception as error:  # configs validate themselves in many ways
        raise ValueError(
            f"a {row.model_type} model of transformers can't compute what it says: {error}"
        ) from error
    return Described(config, sizes, drafting)


def has_bias(reading: Reading, stem: str) -> bool:
    """Whether any layer has a bias of this name, on its own or merged with those of its like."""
    merged = stem in ("attn_q", "attn_k", "attn_v") and reading.has("attn_qkv", "bias")
    return merged or reading.has(stem, "bias")


def _check_kind(reading: Reading) -> None:
    kind = reading.file.metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(
            f"it holds no model but what it calls {quoted(kind)}; name the file of the model itself"
        )
    reading.expect("attention.causal", True)
    reading.expect("pooling_type", _NO_POOLING)


def _read_sizes(reading: Reading, row: Row, hidden: int, heads: int) -> Sizes:
    size = reading.get("attention.key_length", hidden // heads)
    if reading.get("attention.value_length", size) != size:
        raise ValueError("its keys and values differ in size, which Longspan can't serve")
    # The last is another name for the first, which Ollama writes too.
    for key in ("attention.key_length_swa", "attention.value_length_swa", "attention.head_dim"):
        reading.expect(key, size)
    if row.head_size is None and size != hidden // heads:
        raise ValueError(
            f"its heads have {size} numbers, but those of {reading.architecture} models of transformers have "
            f"{hidden // heads}, the hidden size divided by the heads"
        )
    kv_heads = reading.get("attention.head_count_kv", heads)
    if not row.kv_heads and kv_heads != heads:
        raise ValueError(
            f"{reading.architecture} models of transformers have as many KV heads as query heads"
        )
    return Sizes(heads, kv_heads, size)


def _vocabulary(reading: Reading) -> int:
    name = "token_embd.weight"
    if name not in reading.file:
        raise ValueError(f"it has no tensor {name}")
    size = reading.file.shape(name)[0]
    if reading.get("vocab_size", size) != size:
        raise ValueError(
            f"it says that its vocabulary has {reading.get('vocab_size')} tokens, but {name} has {size}"
        )
    tokens = len(reading.file.metadata.get("tokenizer.ggml.tokens", ()))
    if tokens > size:
        raise ValueError(f"its tokenizer has {tokens} tokens, but {name} only {size}")
    return size


def _is_by_layer(known: Any) -> bool:
    return "sliding_attention" in (known.rope_parameters or {})


def _by_layer(reading: Reading, row: Row, rope: dict[str, Any]) -> dict[str, Any]:
    """Layers with a window have rotary embeddings of their own, which are never scaled."""
    base = row.local_base or rope["rope_theta"]
    local = {"rope_type": "default", "rope_theta": float(reading.get("rope.freq_base_swa", base))}
    return {"full_attention": rope, "sliding_attention": local}
