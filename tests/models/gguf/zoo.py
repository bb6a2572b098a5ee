"""Tiny models of every architecture that is read from GGUF files, with the options that files tell of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer

from tests.models_zoo import SPECIAL, VOCABULARY, byte_level

WINDOW = 12
# Positions that a scaling starts from. Texts are compared beyond all of these.
ORIGINAL = 40
LENGTH = 100

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 320,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_WIDE = {**_SIZES, "head_dim": 12}
_LARGE = {**_SIZES, "head_dim": 32}
_NEOX = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


class Case(NamedTuple):
    """A model and its file.

    Attributes:
        architecture: as GGUF files call it.
        kind: of transformers.
        config: of the model.
        keys: of the file, beyond the usual ones.
    """

    architecture: str
    kind: str
    config: dict[str, Any]
    keys: dict[str, Any] | None = None


def _rope(kind: str = "default", base: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_theta": base, "rope_type": kind, **values}


def _scaled(kind: str, factor: float, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": _rope(kind, factor=factor, **values)}


def _inside(layers: int, period: int) -> dict[str, Any]:
    return {
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": [layer % period < period - 1 for layer in range(layers)],
    }


_YARN = {"original_max_position_embeddings": ORIGINAL}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **_YARN}
_HALF = {"rope_parameters": _rope(partial_rotary_factor=0.5)}
_LAYERED = {"sliding_window": WINDOW, "num_hidden_layers": 5}
_MULTIPLIERS = {
    "attention_multiplier": 0.11,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}

CASES = {
    "llama": Case("llama", "llama", _SIZES),
    "llama, tied, wide heads": Case("llama", "llama", {**_WIDE, "tie_word_embeddings": True}),
    "llama, biases": Case("llama", "llama", {**_SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama, linear": Case("llama", "llama", {**_SIZES, **_scaled("linear", 4.0)}),
    "llama, yarn": Case(
        "llama", "llama", {**_LARGE, **_scaled("yarn", 8.0, beta_fast=2.0, beta_slow=0.5, **_YARN)}
    ),
    "llama, yarn with a factor": Case(
        "llama", "llama", {**_SIZES, **_scaled("yarn", 8.0, attention_factor=1.3, **_YARN)}
    ),
    "llama, frequency factors": Case("llama", "llama", {**_LARGE, **_scaled("llama3", 32.0, **_LLAMA3)}),
    "mistral": Case(
        "llama", "mistral", {**_SIZES, "sliding_window": WINDOW}, {"attention.sliding_window": WINDOW}
    ),
    "mistral3": Case("mistral3", "mistral", {**_WIDE, "sliding_window": None}),
    "ministral3": Case(
        "mistral3",
        "ministral3",
        {
            **_WIDE,
            "sliding_window": None,
            **_scaled(
                "yarn",
                8.0,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=0.5,
                llama_4_scaling_beta=0.1,
                **_YARN,
            ),
        },
        {"attention.temperature_scale": 0.1, "rope.scaling.yarn_log_multiplier": 0.5},
    ),
    "mixtral": Case("llama", "mixtral", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Case("qwen2", "qwen2", {**_SIZES, **_scaled("yarn", 4.0, **_YARN)}),
    "qwen2moe": Case("qwen2moe", "qwen2_moe", {**_SIZES, **_EXPERTS, "shared_expert_intermediate_size": 28}),
    "qwen3": Case("qwen3", "qwen3", {**_WIDE, **_scaled("linear", 4.0)}),
    "qwen3moe": Case("qwen3moe", "qwen3_moe", {**_WIDE, **_EXPERTS, "norm_topk_prob": True}),
    "phi2": Case("phi2", "phi", {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 4, **_HALF}),
    "phi3": Case("phi3", "phi3", {**_SIZES, "sliding_window": WINDOW}, {"attention.sliding_window": WINDOW}),
    "phi3, longrope": Case(
        "phi3",
        "phi3",
        {
            **_SIZES,
            "num_attention_heads": 2,
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": _rope(
                "longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                long_factor=[2.0, 2.5, 3.0, 4.0, 5.5, 6.25],
                original_max_position_embeddings=ORIGINAL,
            ),
        },
        {"attention.sliding_window": 0},
    ),
    "starcoder2": Case("starcoder2", "starcoder2", {**_SIZES, "rope_parameters": _rope(base=123456.0)}),
    "starcoder2, no biases": Case(
        "starcoder2", "starcoder2", {**_SIZES, "use_bias": False, "tie_word_embeddings": False}
    ),
    "gpt2": Case(
        "gpt2",
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 300},
    ),
    "gptneox": Case("gptneox", "gpt_neox", {**_NEOX, **_HALF}, {"use_parallel_residual": True}),
    "gptneox, in sequence": Case(
        "gptneox", "gpt_neox", {**_NEOX, "use_parallel_residual": False}, {"use_parallel_residual": False}
    ),
    "gemma": Case("gemma", "gemma", _WIDE),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {
            **_WIDE,
            "sliding_window": WINDOW,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 7.0,
        },
        {
            "attention.sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 7.0,
        },
    ),
    "gemma3": Case(
        "gemma3",
        "gemma3_text",
        {
            **_WIDE,
            "sliding_window": WINDOW,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 12,
            "rope_parameters": {
                "full_attention": _rope("linear", 1000000.0, factor=8.0),
                "sliding_attention": _rope(),
            },
        },
        {"attention.sliding_window": WINDOW},
    ),
    "olmo2": Case("olmo2", "olmo2", _SIZES),
    "olmo3": Case(
        "olmo2",
        "olmo3",
        {
            **_SIZES,
            **_LAYERED,
            "rope_parameters": {
                "full_attention": _rope("yarn", 500000.0, factor=8.0, **_YARN),
                "sliding_attention": _rope(base=500000.0),
            },
        },
        _inside(5, 4),
    ),
    "granite": Case(
        "granite",
        "granite",
        {**_SIZES, **_MULTIPLIERS},
        {"attention.scale": 0.11, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0},
    ),
    "command-r": Case("command-r", "cohere", {**_SIZES, "logit_scale": 0.25}, {"logit_scale": 0.25}),
    "command-r, norms": Case(
        "command-r", "cohere", {**_SIZES, "logit_scale": 0.25, "use_qk_norm": True}, {"logit_scale": 0.25}
    ),
    "cohere2": Case(
        "cohere2",
        "cohere2",
        {**_SIZES, **_LAYERED, "logit_scale": 0.25},
        {"logit_scale": 0.25, "attention.sliding_window": WINDOW, "rope.scaling.type": "none"},
    ),
    "smollm3": Case("smollm3", "smollm3", {**_SIZES, "num_hidden_layers": 5}),
    "glm4": Case("glm4", "glm4", {**_WIDE, "attention_bias": True, **_HALF}),
    "exaone4": Case("exaone4", "exaone4", {**_SIZES, **_LAYERED}, _inside(5, 4)),
    "exaone4, frequency factors": Case(
        "exaone4",
        "exaone4",
        {
            **_SIZES,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            **_scaled("llama3", 16.0, **_LLAMA3),
        },
    ),
    "gpt-oss": Case(
        "gpt-oss",
        "gpt_oss",
        {
            **_LARGE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "num_hidden_layers": 3,
            "rope_parameters": _rope("yarn", 150000.0, factor=32.0, truncate=False, **_YARN),
        },
        {"attention.sliding_window": WINDOW, "expert_feed_forward_length": 48},
    ),
    "stablelm": Case(
        "stablelm",
        "stablelm",
        {**_SIZES, "use_qkv_bias": True, **_HALF},
        {"use_parallel_residual": True},  # as converters guess
    ),
    "stablelm, parallel, norms": Case(
        "stablelm",
        "stablelm",
        {**_SIZES, "qk_layernorm": True, "use_parallel_residual": True, **_HALF},
        {"use_parallel_residual": True},
    ),
    "nemotron": Case(
        "nemotron",
        "nemotron",
        {**_SIZES, **_HALF},
        {"rope.scaling.type": "none", "attention.layer_norm_rms_epsilon": 1e-5},
    ),
}


def save(case: Case, folder: Path) -> Any:
    """Writes the case's model with random weights, none of which leaves no trace, and gives it."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(case.kind, **case.config)
        for name in _EPSILONS:
            if hasattr(config, name):
                setattr(config, name, 3e-3)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    finally:
        torch.set_rng_state(state)
    model.eval().save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level(*SPECIAL)), bos_token="<|text|>", eos_token="<|end|>"
    )
    tokenizer.save_pretrained(folder)
    return model
