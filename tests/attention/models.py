"""Tiny models with random weights, and a paged cache under them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attention import Attention, AttentionBatch, LayerSpec, PagedCache, Step, register
from attention.forward import forward

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 12, "sliding_window_pattern": 2},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {**EXPERTS, "sliding_window": 9},
    "gpt_oss": {**EXPERTS, "sliding_window": 9},
    "qwen2_moe": {
        **EXPERTS,
        "shared_expert_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 4,
    },
    "phimoe": {**EXPERTS, "sliding_window": 9},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {"partial_rotary_factor": 0.5},
    "whisper": {
        "d_model": 32,
        "decoder_layers": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "max_target_positions": 128,
        "is_encoder_decoder": False,
    },
    "afmoe": {**EXPERTS, "sliding_window": 9, "num_dense_layers": 1, "global_attn_every_n_layers": 2},
    # Two that also see images, whose other parts stay as small as they can be.
    "got_ocr2": {
        "text_config": {**SIZES, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 8,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "mlp_dim": 8,
            "global_attn_indexes": [0],
        },
    },
    "gemma4_unified": {
        "text_config": {**SIZES, "global_head_dim": 16, "sliding_window": 9},
        "vision_config": {"mm_embed_dim": 8, "mm_posemb_size": 4, "output_proj_dims": 32, "patch_size": 2},
        "audio_config": {"audio_embed_dim": 8},
    },
}


def tiny(kind: str, implementation: str = "longspan", **own: Any) -> Any:
    """Random weights, the same for the same arguments; large enough that attention matters."""
    register()
    values = {**OWN.get(kind, {}), **own}
    sizes = {} if kind in ("gpt2", "falcon") or "text_config" in values else SIZES
    config = AutoConfig.for_model(kind, **{**sizes, **values})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 or "sinks" in name else 0.1)
            )
    model.set_attn_implementation(implementation)
    return model


def paged_logits(
    model: Any, layers: list[LayerSpec], attention: Attention, prompts: list[list[int]], chunk: int
) -> list[torch.Tensor]:
    """Logits ``[len(prompt), V]`` of every prompt, all computed in one batch, ``chunk`` tokens at a time."""
    page_size = 4
    counts = [-(-len(prompt) // page_size) for prompt in prompts]
    cache = PagedCache(layers, sum(counts) + 1, page_size, torch.float32, poison=True)
    shuffled = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1
    pages = [part.tolist() for part in shuffled.split(counts)]
    by_index = {layer.index: layer for layer in layers}
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for begin in range(0, max(map(len, prompts)), chunk):
        present = [b for b, prompt in enumerate(prompts) if begin < len(prompt)]
        works = [prompts[b][begin : begin + chunk] for b in present]
        lengths = [len(work) for work in works]
        batch = AttentionBatch.build([begin] * len(works), lengths, [pages[b] for b in present], page_size)
        ids = torch.tensor([token for work in works for token in work])
        with torch.inference_mode():
            logits = forward(model, ids, batch.device.positions, Step(attention, cache, batch, by_index))
        for b, part in zip(present, logits.split(lengths), strict=True):
            found[b].append(part)
    return [torch.cat(parts) for parts in found]
