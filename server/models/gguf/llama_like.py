"""Architectures of Llama's shape: RMS norms, separate projections, a gated MLP."""

from __future__ import annotations

from functools import partial
from typing import Any

from server.models.gguf.experts import EXPERTS, read_experts
from server.models.gguf.reading import Reading
from server.models.gguf.row import ATTENTION, ATTENTION_BIASES, MLP, MLP_BIASES, MODEL, NORMS, Row, Rule
from server.models.gguf.transforms import minus_one, rotary_key, rotary_query
from server.models.gguf.windows import Window

_SIDE_BY_SIDE = {
    "self_attn.q_proj.weight": Rule(("attn_q.weight",), rotary_query),
    "self_attn.q_proj.bias": Rule(("attn_q.bias",), rotary_query),
    "self_attn.k_proj.weight": Rule(("attn_k.weight",), rotary_key),
    "self_attn.k_proj.bias": Rule(("attn_k.bias",), rotary_key),
}
_BIASES = {"attention_bias": ATTENTION_BIASES, "mlp_bias": MLP_BIASES}
_PLAIN = {**ATTENTION, **MLP, **NORMS}
_LLAMA = {**_PLAIN, **_SIDE_BY_SIDE}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA_NORMS = {
    "input_layernorm.weight": Rule(("attn_norm.weight",), minus_one),
    "post_attention_layernorm.weight": Rule(("ffn_norm.weight",), minus_one),
}
_GEMMA_MODEL = {**MODEL, "model.norm.weight": Rule(("output_norm.weight",), minus_one)}
_GEMMA2 = {
    **ATTENTION,
    **MLP,
    "input_layernorm.weight": Rule(("attn_norm.weight",), minus_one),
    "post_attention_layernorm.weight": Rule(("post_attention_norm.weight",), minus_one),
    "pre_feedforward_layernorm.weight": Rule(("ffn_norm.weight",), minus_one),
    "post_feedforward_layernorm.weight": Rule(("post_ffw_norm.weight",), minus_one),
}
# llama.cpp's values for Gemma 2 where the file has none.
_ATTENTION_CAP, _FINAL_CAP, _GEMMA2_WINDOW = 50.0, 30.0, 4096
# The largest Gemma 2 and 3 scale queries by their share of the hidden size. Files don't say so; llama.cpp
# tells these models by their number of layers, too.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}


def _qwen2_moe(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    return {
        **_qwen_experts(reading, values, normalized=False),
        "shared_expert_intermediate_size": reading.get(
            "expert_shared_feed_forward_length", values["intermediate_size"]
        ),
    }


def _qwen_experts(reading: Reading, values: dict[str, Any], *, normalized: bool) -> dict[str, Any]:
    found = read_experts(reading, "num_experts", normalized=normalized)
    # Where older files don't say the size of experts, their sizes sum to that of a dense layer.
    size = values["intermediate_size"] // max(1, found["num_experts_per_tok"])
    return {
        **found,
        "moe_intermediate_size": reading.get("expert_feed_forward_length", size),
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


def _query_scale(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    if values["num_hidden_layers"] == _LARGEST_GEMMA[reading.architecture]:
        return {"query_pre_attn_scalar": values["hidden_size"] // values["num_attention_heads"]}
    return {"query_pre_attn_scalar": values["head_dim"]}


def _gemma2(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    return {
        **_query_scale(reading, values),
        "attn_logit_softcapping": reading.get("attn_logit_softcapping", _ATTENTION_CAP) or None,
        "final_logit_softcapping": reading.get("final_logit_softcapping", _FINAL_CAP) or None,
    }


def _gemma3(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    return {
        **_query_scale(reading, values),
        "final_logit_softcapping": reading.get("final_logit_softcapping", 0.0) or None,
    }


def _granite(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    # Files of models without rotary embeddings say so by this flag.
    reading.expect("rope.scaling.finetuned", True)
    head_size = values["hidden_size"] // values["num_attention_heads"]
    return {
        "attention_multiplier": reading.get("attention.scale", 0.0) or head_size**-0.5,
        "embedding_multiplier": reading.get("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": reading.get("residual_scale", 0.0) or 1.0,
        "logits_scaling": reading.get("logit_scale"),
    }


_LLAMA_ROW = Row("llama", _LLAMA, biases=_BIASES)
_MISTRAL_ROW = Row("mistral", _LLAMA, window=Window())
_MIXTRAL_ROW = Row(
    "mixtral",
    {**ATTENTION, **_SIDE_BY_SIDE, **NORMS, **EXPERTS},
    window=Window(),
    more=lambda reading, _: read_experts(reading, "num_local_experts"),
)
# Mistral whose queries grow with their position.
_MINISTRAL3_ROW = Row(
    "ministral3", _LLAMA, window=Window(), rope_keys={"attention.temperature_scale": "llama_4_scaling_beta"}
)
_OLMO = {**ATTENTION, **MLP, **_HEAD_NORMS, **_AFTER}

ROWS = {
    "llama": _LLAMA_ROW,
    "mistral3": _MISTRAL_ROW,
    "qwen2": Row("qwen2", _PLAIN, head_size=None),
    "qwen2moe": Row(
        "qwen2_moe",
        {
            **ATTENTION,
            **NORMS,
            **EXPERTS,
            "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
            "mlp.shared_expert.up_proj": "ffn_up_shexp",
            "mlp.shared_expert.down_proj": "ffn_down_shexp",
            "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        },
        head_size=None,
        more=_qwen2_moe,
    ),
    "qwen3": Row("qwen3", {**_PLAIN, **_HEAD_NORMS}, biases={"attention_bias": ATTENTION_BIASES}),
    "qwen3moe": Row(
        "qwen3_moe",
        {**ATTENTION, **NORMS, **_HEAD_NORMS, **EXPERTS},
        biases={"attention_bias": ATTENTION_BIASES},
        more=partial(_qwen_experts, normalized=True),
    ),
    # Files do not say that every fourth layer has no rotary embedding.
    "smollm3": Row("smollm3", _LLAMA, biases=_BIASES, head_size=None, fixed={"no_rope_layer_interval": 4}),
    "granite": Row("granite", _LLAMA, biases=_BIASES, head_size=None, more=_granite),
    "olmo2": Row("olmo2", _OLMO, biases={"attention_bias": ATTENTION_BIASES}, head_size=None),
    "exaone4": Row(
        "exaone4", {**ATTENTION, **MLP, **_HEAD_NORMS, **_AFTER}, window=Window(period=4, by_layer=True)
    ),
    "gemma": Row(
        "gemma",
        {**ATTENTION, **MLP, **_GEMMA_NORMS},
        _GEMMA_MODEL,
        biases={"attention_bias": ATTENTION_BIASES},
    ),
    "gemma2": Row(
        "gemma2",
        _GEMMA2,
        _GEMMA_MODEL,
        biases={"attention_bias": ATTENTION_BIASES},
        window=Window(period=2, by_layer=True, default=_GEMMA2_WINDOW),
        more=_gemma2,
    ),
    "gemma3": Row(
        "gemma3_text",
        {
            **_GEMMA2,
            "self_attn.q_norm.weight": Rule(("attn_q_norm.weight",), minus_one),
            "self_attn.k_norm.weight": Rule(("attn_k_norm.weight",), minus_one),
        },
        _GEMMA_MODEL,
        biases={"attention_bias": ATTENTION_BIASES},
        window=Window(period=6, by_layer=True),
        more=_gemma3,
        local_base=10000.0,
    ),
}
_OLMO3_ROW = Row(
    "olmo3",
    _OLMO,
    biases={"attention_bias": ATTENTION_BIASES},
    head_size=None,
    window=Window(period=4, by_layer=True),
)


def choose_llama(reading: Reading) -> Row:
    """Llama; with experts Mixtral; with a window Mistral."""
    if reading.get("expert_count", 0):
        return _MIXTRAL_ROW
    return _MISTRAL_ROW if reading.get("attention.sliding_window", 0) else _LLAMA_ROW


def choose_mistral(reading: Reading) -> Row:
    """Mistral; where positions scale its queries, Ministral 3."""
    return _MINISTRAL3_ROW if reading.get("attention.temperature_scale", 0.0) else _MISTRAL_ROW


def choose_olmo(reading: Reading) -> Row:
    """OLMo 2; with a window OLMo 3."""
    return _OLMO3_ROW if reading.get("attention.sliding_window", 0) else ROWS["olmo2"]
