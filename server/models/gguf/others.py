"""Architectures of other shapes: layer norms, merged projections, MLPs without a gate."""

from __future__ import annotations

from typing import Any

from server.models.gguf.experts import count_experts, read_experts
from server.models.gguf.reading import Reading
from server.models.gguf.row import ATTENTION, ATTENTION_BIASES, MLP, MODEL, NORMS, SIZES, Row, Rule
from server.models.gguf.transforms import by_head, in_turn, key_row, minus_one, query_row, transposed
from server.models.gguf.windows import Window

_LAYER_NORM = "attention.layer_norm_epsilon"
_COHERE_KEYS = {**SIZES, _LAYER_NORM: "layer_norm_eps", "logit_scale": "logit_scale"}
_UNGATED_BIASES = ("ffn_up", "ffn_down")


def _phi3(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    context = values["max_position_embeddings"]
    return {"original_max_position_embeddings": reading.get("rope.scaling.original_context_length", context)}


def _stablelm(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "use_parallel_residual": not reading.has("ffn_norm"),
        "qk_layernorm": reading.has("attn_q_norm"),
    }


def _gpt_oss(reading: Reading, values: dict[str, Any]) -> dict[str, Any]:
    # The weights of the chosen experts are a softmax over their scores, which the file can call by a name
    # of its own.
    softmax_of_chosen = 3
    if reading.get("expert_gating_func", softmax_of_chosen) == softmax_of_chosen:
        count, used = count_experts(reading)
        return {"num_local_experts": count, "num_experts_per_tok": used}
    return read_experts(reading, "num_local_experts")


ROWS = {
    "phi2": Row(
        "phi",
        {
            **ATTENTION,
            "self_attn.dense": "attn_output",
            "mlp.fc1": "ffn_up",
            "mlp.fc2": "ffn_down",
            "input_layernorm": "attn_norm",
        },
        {**MODEL, "model.final_layernorm": "output_norm"},
        keys={**SIZES, _LAYER_NORM: "layer_norm_eps"},
        head_size=None,
        rope="partial",
    ),
    "phi3": Row(
        "phi3",
        {
            **NORMS,
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        head_size=None,
        rope="partial",
        window=Window(),
        more=_phi3,
    ),
    "starcoder2": Row(
        "starcoder2",
        {**ATTENTION, **NORMS, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        keys={**SIZES, _LAYER_NORM: "norm_epsilon"},
        head_size=None,
        window=Window(),
        biases={"use_bias": (*ATTENTION_BIASES, *_UNGATED_BIASES)},
    ),
    "gpt2": Row(
        "gpt2",
        {
            "ln_1": "attn_norm",
            "ln_2": "ffn_norm",
            "attn.c_attn.weight": Rule(("attn_qkv.weight",), transposed),
            "attn.c_attn.bias": Rule(("attn_qkv.bias",)),
            "attn.c_proj.weight": Rule(("attn_output.weight",), transposed),
            "attn.c_proj.bias": Rule(("attn_output.bias",)),
            "mlp.c_fc.weight": Rule(("ffn_up.weight",), transposed),
            "mlp.c_fc.bias": Rule(("ffn_up.bias",)),
            "mlp.c_proj.weight": Rule(("ffn_down.weight",), transposed),
            "mlp.c_proj.bias": Rule(("ffn_down.bias",)),
        },
        {
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        layers="transformer.h.",
        keys={
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            _LAYER_NORM: "layer_norm_epsilon",
        },
        kv_heads=False,
        head_size=None,
        rope=None,
    ),
    "gptneox": Row(
        "gpt_neox",
        {
            **NORMS,
            "attention.query_key_value.weight": Rule(("attn_qkv.weight",), by_head),
            "attention.query_key_value.bias": Rule(("attn_qkv.bias",), by_head),
            "attention.dense": "attn_output",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        {
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "lm_head": "output",
            "embed_out": "output",
        },
        layers="gpt_neox.layers.",
        keys={**SIZES, _LAYER_NORM: "layer_norm_eps"},
        kv_heads=False,
        head_size=None,
        rope="partial",
        biases={"attention_bias": ("attn_qkv", "attn_output")},
        more=lambda reading, _: {"use_parallel_residual": bool(reading.get("use_parallel_residual"))},
    ),
    "stablelm": Row(
        "stablelm",
        {
            **ATTENTION,
            **MLP,
            **NORMS,
            "self_attn.q_layernorm.norms.#.weight": Rule(("attn_q_norm.weight",), query_row),
            "self_attn.k_layernorm.norms.#.weight": Rule(("attn_k_norm.weight",), key_row),
        },
        keys={**SIZES, _LAYER_NORM: "layer_norm_eps"},
        head_size=None,
        rope="partial",
        biases={"use_qkv_bias": ("attn_q", "attn_k", "attn_v")},
        more=_stablelm,
        unused={"use_parallel_residual": "the layers' norms show it, and converters write it as they guess"},
    ),
    "nemotron": Row(
        "nemotron",
        {
            **ATTENTION,
            **NORMS,
            "input_layernorm.weight": Rule(("attn_norm.weight",), minus_one),
            "post_attention_layernorm.weight": Rule(("ffn_norm.weight",), minus_one),
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        {**MODEL, "model.norm.weight": Rule(("output_norm.weight",), minus_one)},
        keys={**SIZES, _LAYER_NORM: "norm_eps"},
        rope="partial",
        biases={"attention_bias": ATTENTION_BIASES, "mlp_bias": _UNGATED_BIASES},
        unused={"attention.layer_norm_rms_epsilon": "it has layer norms, whose own key converters write too"},
    ),
    "command-r": Row(
        "cohere",
        {
            **ATTENTION,
            **MLP,
            "input_layernorm": "attn_norm",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
        },
        keys=_COHERE_KEYS,
        head_size=None,
        biases={"attention_bias": ATTENTION_BIASES},
        more=lambda reading, _: {"use_qk_norm": reading.has("attn_q_norm")},
    ),
    "cohere2": Row(
        "cohere2",
        {**ATTENTION, **MLP, "input_layernorm": "attn_norm"},
        keys=_COHERE_KEYS,
        biases={"attention_bias": ATTENTION_BIASES},
        window=Window(period=4, by_layer=True),
    ),
    "glm4": Row(
        "glm4",
        {
            **ATTENTION,
            "input_layernorm": "attn_norm",
            "post_self_attn_layernorm": "post_attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "post_mlp_layernorm": "post_ffw_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        rope="partial",
        biases={"attention_bias": ("attn_q", "attn_k", "attn_v")},
    ),
    "gpt-oss": Row(
        "gpt_oss",
        {
            **ATTENTION,
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "self_attn.sinks": Rule(("attn_sinks.weight",)),
            "mlp.router": "ffn_gate_inp",
            "mlp.experts.gate_up_proj": Rule(("ffn_gate_exps.weight", "ffn_up_exps.weight"), in_turn),
            "mlp.experts.gate_up_proj_bias": Rule(("ffn_gate_exps.bias", "ffn_up_exps.bias"), in_turn),
            "mlp.experts.down_proj": Rule(("ffn_down_exps.weight",), transposed),
            "mlp.experts.down_proj_bias": Rule(("ffn_down_exps.bias",)),
        },
        keys={
            **{key: name for key, name in SIZES.items() if key != "feed_forward_length"},
            "attention.layer_norm_rms_epsilon": "rms_norm_eps",
            "expert_feed_forward_length": "intermediate_size",
        },
        biases={"attention_bias": ATTENTION_BIASES},
        window=Window(period=2, by_layer=True),
        more=_gpt_oss,
        unused={"feed_forward_length": "all of its layers are mixtures of experts"},
        truncate=False,
    ),
}
