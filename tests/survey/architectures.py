"""Every decoder architecture of the installed transformers, as a small config, and its variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as _CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as _WHOLE

from tests.survey.sizes import shrink
from tests.survey.variants import VARIANTS


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        kind: the model's type in transformers.
        variant: what differs from its default config, in words; empty for nothing.
        changes: values written into the small config; of nested configs likewise.
        auto: the class of transformers that makes the model from its config.
    """

    kind: str
    variant: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"

    @property
    def name(self) -> str:
        """How rows are told apart."""
        return f"{self.kind}, {self.variant}" if self.variant else self.kind

    @property
    def class_name(self) -> str:
        """The class of transformers."""
        mapping = _CAUSAL if self.auto == "AutoModelForCausalLM" else _WHOLE
        return str(mapping[self.kind])


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_UNSHRUNK_LOGITS = {"logit_scale": 1.0}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

# What no rule by name makes small, or what a default config lacks to be one of a model at all.
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "cohere": _UNSHRUNK_LOGITS,
    "cohere2": _UNSHRUNK_LOGITS,
    "cohere2_moe": _UNSHRUNK_LOGITS,
    "cohere_compass_text": {"rope_parameters": _SLIDING, "layer_types": _MIXED},
    "dbrx": {
        "attn_config": {"rope_theta": 500000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "num_key_value_heads": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": {"head_dim": 24}},
    "dots3_note_text": {"head_dim": 24},
    "emu3": {
        "vocabulary_map": {"<image>": 190, "<|extra_200|>": 189},
        "vq_config": {"base_channels": 32},
    },
    "falcon_h1": {"mamba_n_heads": 8},
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5],
    },
}

# What the config class needs to exist at all.
_NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
}


def kinds() -> list[str]:
    """All types of causal language models that transformers knows, sorted."""
    return sorted(_CAUSAL)


def cases() -> list[Case]:
    """Every type with its default config, then the variants."""
    plain = [Case(kind) for kind in kinds()]
    variants = [
        Case(kind, variant, changes)
        for kind, variants in VARIANTS.items()
        for variant, changes in variants.items()
    ]
    # Published checkpoints of these are the whole model, though its text part has a class of its own.
    whole = [
        Case(kind, "the whole model", auto="AutoModelForMultimodalLM")
        for kind in kinds()
        if _WHOLE.get(kind, _CAUSAL[kind]) != _CAUSAL[kind]
    ]
    return plain + variants + whole


def config_of(case: Case) -> Any:
    """The small config."""
    config_class = CONFIG_MAPPING[case.kind]
    values = shrink(config_class(**_NEEDED.get(case.kind, {})).to_dict())
    if "is_decoder" in values:
        values["is_decoder"] = True
    _merge(values, _CHANGES.get(case.kind, {}))
    _merge(values, case.changes)
    return config_class.from_dict(values)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict) and name.endswith("_config"):
            _merge(values[name], value)
        else:
            values[name] = value
