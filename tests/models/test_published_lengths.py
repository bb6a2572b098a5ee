"""Context lengths of published configs, each with what its makers say of it."""

import pytest
import transformers

from server.models.limits import context_length

PAIRS = 48  # of Phi-3's heads


def yarn(factor, original, **more):
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original, **more}


def llama3(factor):
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# The model's type, what its config.json says, and the length. Where the makers say it: the model's card.
PUBLISHED = {
    "Llama 3.1 8B: card, 128k": ("llama", 131072, llama3(8.0), 131072),
    "Llama 3.2 1B: card, 128k": ("llama", 131072, llama3(32.0), 131072),
    "EXAONE 3.5 as llama: card, 32,768": ("llama", 32768, llama3(8.0), 32768),
    "Apertus 8B: card, 65,536": ("apertus", 65536, llama3(8.0), 65536),
    "Qwen2.5 7B: card, 131,072 with this entry": ("qwen2", 32768, yarn(4.0, 32768), 131072),
    "Qwen2.5 7B as published: card, 32,768 without it": ("qwen2", 32768, None, 32768),
    "Qwen3 8B: card, 131,072 with this entry": ("qwen3", 40960, yarn(4.0, 32768), 131072),
    "DeepSeek-R1-0528-Qwen3-8B": ("qwen3", 131072, yarn(4.0, 32768, attn_factor=0.878), 131072),
    "Yarn-Llama-2 64k": ("llama", 65536, yarn(16.0, 4096, finetuned=True), 65536),
    "Yarn-Mistral 128k: its name": ("mistral", 32768, yarn(16.0, 8192, finetuned=True), 131072),
    "DeepSeek V3": (
        "deepseek_v3",
        163840,
        yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1),
        163840,
    ),
    "Kimi K2 as deepseek_v3: card, 128k": ("deepseek_v3", 131072, yarn(32.0, 4096), 131072),
    "gpt-oss 20b: card, 131,072": ("gpt_oss", 131072, yarn(32.0, 4096, truncate=False), 131072),
    "Olmo 3 7B: card, 65,536": ("olmo3", 65536, yarn(8.0, 8192), 65536),
    "InternLM2.5 as llama: dynamic from 32,768 on": (
        "llama",
        32768,
        {"type": "dynamic", "factor": 2.0},
        65536,
    ),
    "DeepSeek-Coder 6.7B: card, 16k": ("llama", 16384, {"type": "linear", "factor": 4.0}, 16384),
    "Vicuna 1.5 16k": ("llama", 4096, {"type": "linear", "factor": 4.0}, 16384),
    "Chinese-Alpaca-2 16k": ("llama", 16384, {"type": "linear", "factor": 4.0}, 16384),
    "Phi-3-mini 128k: its name": (
        "phi3",
        131072,
        {"type": "longrope", "short_factor": [1.0] * PAIRS, "long_factor": [2.0] * PAIRS},
        131072,
    ),
    "Gemma 3 4B's text model: card, 128k": (
        "gemma3_text",
        131072,
        {"rope_type": "linear", "factor": 8.0},
        131072,
    ),
    "Gemma 4's text model, proportional on its global layers": ("gemma4_text", 131072, None, 131072),
}
# By the model's type or name, what else its config says.
OTHERS = {
    "phi3": {"hidden_size": 3072, "num_attention_heads": 32, "original_max_position_embeddings": 4096},
    "Vicuna 1.5 16k": {"max_sequence_length": 16384},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_what_the_makers_say(name):
    kind, longest, scaling, length = PUBLISHED[name]
    config = transformers.AutoConfig.for_model(
        kind,
        max_position_embeddings=longest,
        rope_theta=10000.0,
        **({} if scaling is None else {"rope_scaling": dict(scaling)}),
        **OTHERS.get(kind, {}),
        **OTHERS.get(name, {}),
    )
    assert context_length(config, None) == length
