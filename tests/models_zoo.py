"""Small models with random weights, saved as complete Hugging Face folders."""

from __future__ import annotations

import functools
import inspect
import pydoc
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.made_once import made_once

VOCABULARY = 320
SPECIAL = ("<|text|>", "<|start|>", "<|end|>")
CONTEXT = 512
WINDOW = 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 16}
_GEMMA = {**_GROUPED, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
_GEMMA4 = {"num_hidden_layers": 6, "global_head_dim": 32, "sliding_window": WINDOW}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

# The decoder of an encoder-decoder model.
_HALF: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "max_position_embeddings": CONTEXT,
    "max_target_positions": CONTEXT,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": False,
}
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
}

# The model's type in transformers, and its config where that differs from the defaults.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {**_SIZES, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 3, "sliding_window_pattern": 3}),
    "gpt_neox": ("gpt_neox", _SIZES),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    ),
    "opt": ("opt", {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, **_EXPERTS, "num_experts": 4}),
    "stablelm": ("stablelm", {**_SIZES, "num_key_value_heads": 2, "use_qkv_bias": True}),
    "nemotron": ("nemotron", {**_GROUPED, "partial_rotary_factor": 0.5}),
    # Two that also see images, whose other parts stay as small as they can be.
    "got_ocr2": (
        "got_ocr2",
        {
            "text_config": {**_SIZES, "num_key_value_heads": 2, "model_type": "qwen2"},
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
    ),
    "gemma4_unified": (
        "gemma4_unified",
        {
            "text_config": {**_GROUPED, **_GEMMA4},
            "vision_config": {
                "mm_embed_dim": 8,
                "mm_posemb_size": 4,
                "output_proj_dims": 64,
                "patch_size": 2,
            },
            "audio_config": {"audio_embed_dim": 8},
        },
    ),
    "gemma4_unified_text": ("gemma4_unified_text", {**_GROUPED, **_GEMMA4}),
    "whisper": ("whisper", _HALF),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
}
KINDS = tuple(_KINDS)
# Those that are refused because of what they compute.
_KINDS |= {
    "bart": ("bart", _HALF),
    "roberta": ("roberta", {**_SIZES, "is_decoder": True}),
    "blt": (
        "blt",
        {
            "vocab_size": VOCABULARY,
            "encoder_hash_byte_group_size": [2],
            "encoder_hash_byte_group_vocab": 50,
            "patcher_config": _SMALL,
            "encoder_config": {**_SMALL, "hidden_size_global": 32, "cross_attn_k": 2},
            "decoder_config": {**_SMALL, "hidden_size_global": 32, "cross_attn_k": 2},
            "global_config": _SMALL,
            "cross_attn_k": 2,
        },
    ),
}

_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@made_once
def save_tiny(kind: str, folder: Path, **config: Any) -> Path:
    """Writes a model of 2 to 6 layers whose weights are random, and large enough that its words vary.

    The same arguments give the same model. Vocabulary, window and context are this module's constants.

    Args:
        kind: one of ``KINDS``.
        folder: where to write.
        config: values that differ from the kind's own.

    Returns:
        ``folder``, with a byte-level tokenizer and a chat template in it.
    """
    model_type, values = _KINDS[kind]
    values = {**values, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, **config}
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **values), dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases stay near where they are.
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            # Where input and output embeddings are one, large ones would repeat the last token; elsewhere,
            # small ones would leave no trace of it.
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            model.get_input_embeddings().weight.mul_(0.15 if tied else 5)
    finally:
        torch.set_rng_state(torch_state)
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level(*SPECIAL)),
        bos_token="<|text|>",
        eos_token="<|end|>",
        pad_token="<|text|>",
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def byte_level(*special: str) -> str:
    """A byte-level tokenizer of exactly ``VOCABULARY`` tokens, the special ones first, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(special),
    )
    tokenizer.train_from_iterator(inspect.getsource(pydoc).splitlines(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer.to_str()
