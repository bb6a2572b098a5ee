"""Makes the default config of any model small, by what its attributes are called.

Configs of transformers have no common schema, but their attributes have names of a few families: widths,
heads, layers, experts, windows. A value is only ever lowered, so that what a config leaves out stays out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 192
CONTEXT = 512
# Beyond the 40 tokens of the check at start-up, so that the survey sees what it does not.
WINDOW = 48
ORIGINAL = 64
"""Where RoPE scaling starts to matter: ``original_max_position_embeddings``."""

# What an integer attribute is lowered to; the first pattern that matches its whole name counts.
_LIMITS: tuple[tuple[str, int], ...] = (
    (r"original_max_position_embeddings", ORIGINAL),
    (r"max_window_layers", 1),
    (
        r"max_source_positions|max_target_positions|max_position_embeddings|model_max_length|context_length",
        CONTEXT,
    ),
    (r"n_positions|n_ctx|max_seq_len|seq_length|max_num_tiles|num_position_embeddings", CONTEXT),
    # windows and thresholds
    (
        r"(\w*_)?sliding_window(_size)?|(attention_)?window_size|local_attention|local_attention_window_len",
        WINDOW,
    ),
    (r"keep_window_size|attention_chunk_size|floor_scale|log_scaling_n_floor|index_topk|rel_extent", WINDOW),
    (r"\w*_max_distance|max_distance|index_block_size|block_size|(lsh|local)_attn_chunk_length", WINDOW),
    (r"(mamba_)?chunk_size|hash_block_size", WINDOW),
    (r"index_topk_blocks|index_local_blocks", 2),
    # counts of experts, groups, layers of a kind
    (r"(num_|n_|moe_num_)(routed_|local_)?experts|zero_expert_num", 8),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group|num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_nextn_predict_layers", 1),
    (r"moe_layer_end_index", 100),
    (r"(\w*_)?sliding_window_pattern|global_attn_every_n_layers|full_attention_interval|layer_group_size", 2),
    (r"no_rope_layer_interval|(attn|expert)_layer_period|n_layers_per_attn_res_block", 2),
    (r"(attn|expert)_layer_offset", 1),
    (r"num_kv_shared_layers", 2),
    # heads
    (
        r"(num_|n_)?(kv|key_value)_heads|kv_n_heads|swa_num_key_value_heads|num_query_groups|linear_num_key_heads",
        2,
    ),
    (r"num_layers_per_stack", 2),
    (r"\w*num_(\w+_)?heads|n_heads?|\w*attention_heads|(encoder|decoder)_attention_heads|index_n_heads", 4),
    (r"mamba_n_heads|n_mamba_heads", 4),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"swa_head_dim|global_head_dim|\w*head_dim|dim_head|d_head|d_kv|kv_channels|attention_head_size", 16),
    (r"mamba_d_head|mamba_headdim|linear_(key|value)_head_dim|linear_head_dim|d_rel", 16),
    (r"query_pre_attn_scalar", 16),
    (r"n_groups|mamba_n_?groups|o_groups", 2),
    # widths
    (r"\w*codebook_size", 128),
    (r"\w*vocab_size\w*|encoder_hash_byte_group_vocab|ngram_vocab_size_base", VOCABULARY),
    (r"\w*_lora_rank|\w*_rank|hc_lowrank", 16),
    (r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|\w*mlp_dim|d_ff|dff|dim_ff|d_inner", 96),
    (r"feed_forward_size|expert_ffn_hidden_size|ple_embed_dim", 96),
    (r"hidden_size_per_layer_input|hidden_size_per_layer", 16),
    (r"\w*hidden_size\w*|d_model|n_embd|\w*embed_dim|emb_dim|\w*embedding_size|embedding_dim", 64),
    (r"word_embed_proj_dim|lru_width|adapter_(in|out)_dim|adapter_input_size|projector_\w+_dim", 64),
    (r"vision_output_dim|output_channels|conv_output_size|mm_tokens_per_image|input_size", 64),
    (r"mamba_d_ssm|router_hidden_size|cross_hidden_size", 64),
    (r"\w*state_size|\w*d_state", 16),
    (r"num_centroids|num_codebooks|num_quantizers", 4),
    (r"image_size", 28),
    (r"patch_size", 14),
)
_COMPILED = tuple((re.compile(pattern), limit) for pattern, limit in _LIMITS)

_LAYERS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(decoder|encoder)_layers|depth|num_global_layers"
    r"|conf_num_hidden_layers|num_blocks|n_layers"
)
_LEAST_LAYERS = 4
_MOST_LAYERS = 8

_SPECIAL = re.compile(r"\w*_token_id|\w*_token_index|\w*_index|image_token|bo\w_token_id|\w*_id")
_COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config ``values``, as of ``to_dict``, with small sizes; nested configs likewise."""
    result: dict[str, Any] = {}
    layers = next((v for k, v in values.items() if _LAYERS.fullmatch(str(k)) and _is_int(v) and v > 1), None)
    per_layer = {
        name: value for name, value in values.items() if layers and _is_list(value) and len(value) == layers
    }
    kept = _kept_layers(layers, list(per_layer.values())) if layers else []
    specials = VOCABULARY - 1
    for name, value in values.items():
        key = str(name)
        if name in per_layer:
            result[name] = [_lowered(key, value[index]) for index in kept]
        elif key == "per_layer_config" and isinstance(value, Mapping):
            result[name] = {
                str(place): shrink(value[index])
                for place, layer in enumerate(kept)
                for index in value
                if int(index) == layer
            }
        elif isinstance(value, Mapping):
            result[name] = shrink(value)
        elif _is_int(value) and _LAYERS.fullmatch(key):
            result[name] = len(kept) if value == layers else min(value, _LEAST_LAYERS)
        elif _SPECIAL.fullmatch(key) and _is_int(value) and value >= VOCABULARY:
            result[name] = _COMMON.get(key, specials)
            specials -= 1
        elif _is_list(value) and _SPECIAL.fullmatch(key):
            result[name] = [_COMMON.get(key, 2)] if value else value
        else:
            result[name] = _lowered(key, value)
    if values.get("kv_lora_rank"):
        _even_out_latent(values, result)
    return result


def _even_out_latent(values: Mapping[str, Any], result: dict[str, Any]) -> None:
    """With latent attention every head has keys of its own, and sizes that were equal must stay so."""
    result["num_key_value_heads"] = result["num_attention_heads"]
    for name in ("qk_rope_head_dim", "qk_head_dim", "v_head_dim"):
        if values.get(name) is not None and values.get("head_dim") == values[name]:
            result["head_dim"] = result[name]
            break


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _lowered(name: str, value: Any) -> Any:
    if not _is_int(value) or value <= 0:
        return value
    for pattern, limit in _COMPILED:
        if pattern.fullmatch(name):
            return min(value, limit)
    return value


def _kept_layers(count: int, lists: list[Any]) -> list[int]:
    """Layers of every kind that there is, in order: the first of each, then the first ones at all."""
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(repr([values[index] for values in lists]), index)
    chosen = sorted(kinds.values())[:_MOST_LAYERS]
    for index in range(count):
        if len(chosen) >= min(count, _LEAST_LAYERS):
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen)
