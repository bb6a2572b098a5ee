"""Small encoder-decoders with random weights, one for each family, as folders."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, processors

from tests.made_once import made_once
from tests.models_zoo import VOCABULARY, byte_level

CONTEXT = 128
SPECIAL = ["<s>", "<pad>", "</s>", "en_XX", "fr_XX", "__de__"]
ENGLISH, FRENCH, GERMAN = 3, 4, 5
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    # As many: generate's own cache goes by the encoder's.
    "num_decoder_layers": 2,
    "num_heads": 4,
    "n_positions": CONTEXT,
    "relative_attention_max_distance": 24,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "m2m_100", "plbart", "blenderbot"), _BART),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    "longt5": {**_T5, "local_radius": 8},
    # Five positions more than whole windows: sources can't use them.
    "led": {
        **_BART,
        "max_encoder_position_embeddings": CONTEXT + 5,
        "max_decoder_position_embeddings": 60,
        "attention_window": [8, 4],
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "switch_transformers": {**_T5, "num_experts": 2},
}


@made_once
def save_encoder_decoder(kind: str, folder: Path, **config: Any) -> Path:
    """Writes a model whose weights are random, and large enough that tokens matter to each other.

    Args:
        kind: one of ``FAMILIES`` or ``REFUSED``.
        folder: where to write.
        config: values that differ from the family's.

    Returns:
        ``folder``.
    """
    values = {**(FAMILIES | REFUSED)[kind], **config}
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(kind, **values)
        model = transformers.AutoModelForSeq2SeqLM.from_config(made, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad or "embed_positions" in name:
                    continue  # positions that the class computes
                parameter.add_(torch.randn_like(parameter) * (0.4 if parameter.dim() > 1 else 0.05))
    finally:
        torch.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer()), eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _tokenizer() -> str:
    """A byte-level tokenizer that puts a language before a text and the end behind it, as JSON."""
    tokenizer = Tokenizer.from_str(byte_level(*SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="en_XX $A </s>", special_tokens=[("en_XX", ENGLISH), ("</s>", 2)]
    )
    return tokenizer.to_str()
