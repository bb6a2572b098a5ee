"""One architecture: how its keys and tensors in a GGUF file are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from server.models.gguf.reading import Reading
from server.models.gguf.transforms import Transform, same
from server.models.gguf.windows import Window


class Rule(NamedTuple):
    """How one parameter is made.

    Attributes:
        sources: tensors of the file, without the layer's number.
        transform: the function that makes the parameter of them.
    """

    sources: tuple[str, ...]
    transform: Transform = same


SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}

MODEL: Mapping[str, str | Rule] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
ATTENTION: Mapping[str, str | Rule] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
MLP: Mapping[str, str | Rule] = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS: Mapping[str, str | Rule] = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP_BIASES = ("ffn_gate", "ffn_up", "ffn_down")


def _nothing(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Row:
    """An architecture.

    Attributes:
        model_type: of transformers.
        layer: for parameters of a layer, the tensor's name without ``blk.N.``; names of modules stand for
            their weight and bias, whole names for themselves, ``#`` for a number.
        model: the same for the other parameters, by their whole names.
        layers: what the names of a layer's parameters begin with.
        keys: keys that the file must have, without the architecture's name, and the config's name for each.
        kv_heads: the config has a name for them.
        head_size: the config's name for it; ``None`` where it follows from the others.
        rope: ``partial`` if a part of each head can stay unrotated; ``None`` without rotary embeddings.
        window: how the architecture uses windows.
        biases: flags of the config, each with the tensors any of whose biases sets it; those that are
            missing then count as zero.
        fixed: values of the config that the architecture's name implies.
        more: what else the config says, from the file and the config so far.
        unused: keys that say nothing beyond what is read, with the reason.
        rope_keys: keys whose values belong to transformers' rope parameters, with their names there.
        truncate: as of ``read_rope``.
        local_base: base of the rotary embeddings of layers with a window, where the file does not say it and
            it is not that of the others.
    """

    model_type: str
    layer: Mapping[str, str | Rule]
    model: Mapping[str, str | Rule] = field(default_factory=lambda: MODEL)
    layers: str = "model.layers."
    keys: Mapping[str, str] = field(default_factory=lambda: SIZES | RMS)
    kv_heads: bool = True
    head_size: str | None = "head_dim"
    rope: Literal["full", "partial"] | None = "full"
    window: Window | None = None
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[Reading, dict[str, Any]], dict[str, Any]] = _nothing
    unused: Mapping[str, str] = field(default_factory=dict)
    rope_keys: Mapping[str, str] = field(default_factory=dict)
    truncate: bool = True
    local_base: float | None = None
