"""What real configs of the large families switch on, beside their defaults."""

from __future__ import annotations

from typing import Any

from tests.survey.sizes import CONTEXT, ORIGINAL, WINDOW

_HALF = 8  # half of a small head's size: one factor each


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


_LINEAR = _rope("linear", factor=4.0)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL)
_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL,
)
# Its threshold is the config's own length, which the text has to go beyond.
_DYNAMIC = {**_rope("dynamic", factor=8.0), "max_position_embeddings": ORIGINAL}


def _long(half: int = _HALF, **values: Any) -> dict[str, Any]:
    return _rope(
        "longrope",
        short_factor=[1.0 + 0.1 * i for i in range(half)],
        long_factor=[2.0 + 0.5 * i for i in range(half)],
        original_max_position_embeddings=ORIGINAL,
        **values,
    )


_LONG = _long(factor=CONTEXT / ORIGINAL)
_ROPES = {
    "linear RoPE": _LINEAR,
    "dynamic RoPE": _DYNAMIC,
    "yarn RoPE": _YARN,
    "llama3 RoPE": _LLAMA3,
    "longrope RoPE": _LONG,
}
_SLIDING = "sliding_attention"
_FULL = "full_attention"
_MIXED = [_SLIDING, _FULL, _SLIDING, _FULL]
_GEMMA_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    _FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
_ALL_FULL = {"layer_types": [_FULL] * 4}
_EIGHT_FULL = {"layer_types": [_FULL] * 8}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        **_ROPES,
        "tied embeddings": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "one KV head": {"num_key_value_heads": 1},
        "a head size of its own": {"head_dim": 24},
        "yarn RoPE with all its keys": _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=ORIGINAL,
            beta_fast=16.0,
            beta_slow=2.0,
            attention_factor=1.3,
            truncate=False,
        ),
    },
    "mistral": {
        "no window": {"sliding_window": None},
        "yarn RoPE": _YARN,
        "a head size of its own": {"head_dim": 32},
    },
    "mixtral": {"a window": {"sliding_window": WINDOW}},
    "qwen2": {
        "windows": {
            "use_sliding_window": True,
            "max_window_layers": 2,
            "sliding_window": WINDOW,
            "layer_types": None,
        },
        "layer types": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
        "yarn RoPE": _YARN,
        "tied embeddings": {"tie_word_embeddings": True},
    },
    "qwen3": {
        "windows": {
            "use_sliding_window": True,
            "max_window_layers": 2,
            "sliding_window": WINDOW,
            "layer_types": None,
        },
        "yarn RoPE": _YARN,
        "tied embeddings": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True},
    },
    "qwen2_moe": {
        "dense layers between": {"decoder_sparse_step": 2, "norm_topk_prob": True},
        "dense first layer": {"mlp_only_layers": [0]},
    },
    "qwen3_moe": {
        "dense first layer": {"mlp_only_layers": [0]},
        "normed top-k": {"norm_topk_prob": True},
    },
    "phi3": {
        "longrope RoPE": {**_long(), "original_max_position_embeddings": ORIGINAL},
        "longrope RoPE, partial rotary": {
            **_long(6, partial_rotary_factor=0.75),
            "original_max_position_embeddings": ORIGINAL,
        },
        "a window": {"sliding_window": WINDOW},
        "partial rotary": _rope("default", partial_rotary_factor=0.5),
    },
    "phimoe": {
        "longrope RoPE": _long(short_mscale=1.1, long_mscale=1.2),
        "biases": {"attention_bias": True, "lm_head_bias": True},
    },
    "phi": {"q/k norms": {"qk_layernorm": True}, "KV heads": {"num_key_value_heads": 2}},
    "gemma": {"linear RoPE": _LINEAR},
    "gemma2": {
        "no soft-caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "query scale": {"query_pre_attn_scalar": 40},
    },
    "gemma3_text": {
        "linear RoPE on global layers": {"rope_parameters": _GEMMA_ROPES, "layer_types": _MIXED},
        "soft-caps": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    },
    "gemma4_text": {
        "experts": {
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        "shared KV layers": {"num_kv_shared_layers": 2, "layer_types": _MIXED, "per_layer_config": {}},
        "no per-layer input": {"hidden_size_per_layer_input": 0},
    },
    "gpt_neox": {
        "sequential residual": {"use_parallel_residual": False},
        "no biases": {"attention_bias": False},
        "full rotary": _rope("default", partial_rotary_factor=1.0),
        "linear RoPE": _rope("linear", factor=4.0, partial_rotary_factor=0.25),
    },
    "falcon": {
        "new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "alibi": {"alibi": True},
        "sequential, biases": {"parallel_attn": False, "bias": True, "multi_query": False},
    },
    "gpt2": {
        "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
        "unscaled": {"scale_attn_weights": False},
        "upcast": {"reorder_and_upcast_attn": True},
        "untied": {"tie_word_embeddings": False},
    },
    "gpt_bigcode": {"multi-head": {"multi_query": False}},
    "gpt_neo": {"global layers": {"attention_types": [[["global"], 4]], "attention_layers": ["global"] * 4}},
    "opt": {
        "norm after": {"do_layer_norm_before": False},
        "projected embeddings": {"word_embed_proj_dim": 32},
    },
    "cohere": {"q/k norms": {"use_qk_norm": True}, "untied": {"tie_word_embeddings": False}},
    "cohere2": {"layer types": {"layer_types": [_FULL, _SLIDING, _FULL, _SLIDING]}},
    "stablelm": {
        "parallel residual": {"use_parallel_residual": True},
        "q/k norms, biases": {"qk_layernorm": True, "use_qkv_bias": True},
        "KV heads": {"num_key_value_heads": 2},
    },
    "starcoder2": {"a window": {"sliding_window": WINDOW}, "no biases": {"use_bias": False}},
    "persimmon": {"no q/k norms": {"qk_layernorm": False}},
    "nemotron": {"biases": {"attention_bias": True, "mlp_bias": True}},
    "deepseek_v2": {
        "limited groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
        "no query rank": {"q_lora_rank": None},
    },
    "deepseek_v3": {
        "no query rank": {"q_lora_rank": None},
        "halves rotated": {"rope_interleave": False},
        "yarn RoPE": _rope(
            "yarn",
            factor=40.0,
            original_max_position_embeddings=ORIGINAL,
            beta_fast=32,
            beta_slow=1,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        "all dense": {"first_k_dense_replace": 4, "mlp_layer_types": None},
    },
    "minicpm3": {"longrope RoPE": _long(4)},
    "gpt_oss": {"no yarn": _rope("default")},
    "granite": {
        "multipliers": {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        }
    },
    "granitemoeshared": {"a shared expert": {"shared_intermediate_size": 64}},
    "granitemoehybrid": {"attention layers alone": {**_ALL_FULL, "position_embedding_type": "rope"}},
    "smollm3": {"windows": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED}},
    "exaone4": {"windows": {"sliding_window": WINDOW, "layer_types": _MIXED}},
    "olmo": {"clipped q/k/v": {"clip_qkv": 2.0}},
    "olmoe": {"clipped q/k/v": {"clip_qkv": 2.0}},
    "olmo3": {"yarn RoPE": _YARN},
    "glm": {"biases": {"attention_bias": True}},
    "glm4_moe": {"q/k norms": {"use_qk_norm": True}},
    "llama4_text": {
        "no q/k norms": {"use_qk_norm": False},
        "no temperature": {"attn_temperature_tuning": False},
        "global layers alone": _EIGHT_FULL,
    },
    "hunyuan_v1_dense": {"dynamic RoPE with alpha": _rope("dynamic", alpha=1000.0, factor=1.0)},
    "hunyuan_v1_moe": {"dynamic RoPE with alpha": _rope("dynamic", alpha=1000.0, factor=1.0)},
    "minimax_m3_vl_text": {"sparse layers": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}},
    "mpt": {"no alibi": {"attn_config": {"alibi": False}}},
    "seed_oss": {"output bias": {"attention_out_bias": True}},
    "modernbert-decoder": {"global layers alone": _ALL_FULL},
    "lfm2": {"attention layers alone": _EIGHT_FULL},
    "qwen3_next": {"attention layers alone": _ALL_FULL},
    "qwen3_5_text": {"attention layers alone": _ALL_FULL},
    "bert": {"as an encoder": {"is_decoder": False}},
    "roberta": {"as an encoder": {"is_decoder": False}},
    "electra": {"as an encoder": {"is_decoder": False}},
}
"""By type, by what the table calls the variant: what changes in the small config."""
