"""Small encoders with random weights, one for each family, as folders with a real WordPiece tokenizer."""

from __future__ import annotations

import functools
import inspect
import json
import pydoc
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests.made_once import made_once
from tests.models_zoo import save_tiny

VOCABULARY = 300
CONTEXT = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
# RoBERTa's family counts positions from the padding's on.
_OFFSET = {**_SIZES, "max_position_embeddings": CONTEXT + 2, "pad_token_id": 1}
_DISTIL = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": _OFFSET,
    "xlm-roberta": _OFFSET,
    "camembert": _OFFSET,
    "distilbert": {**_DISTIL, "max_position_embeddings": CONTEXT},
    "albert": {**_SIZES, "embedding_size": 16},
    "electra": {**_SIZES, "embedding_size": 16},
    "modernbert": {**_SIZES, "local_attention": 8, "global_attn_every_n_layers": 2, "num_hidden_layers": 4},
    "eurobert": {**_SIZES, "num_key_value_heads": 2},
}
OWN_ATTENTION: dict[str, dict[str, Any]] = {
    "mpnet": _OFFSET,
    "deberta": {**_SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        **_SIZES,
        **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
        **{"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    },
    "longformer": {**_OFFSET, "attention_window": 8},
    "big_bird": {**_SIZES, "block_size": 4, "num_random_blocks": 1},
    "reformer": {
        **_SIZES,
        **{"attn_layers": ["lsh", "local"], "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4},
        **{"num_buckets": 4, "hash_seed": 1, "axial_pos_shape": (8, 12), "axial_pos_embds_dim": (16, 16)},
        **{"attention_head_size": 8, "feed_forward_size": 64, "is_decoder": False},
    },
}
"""Families that compute attention in their own code."""


@made_once
def save_encoder(kind: str, folder: Path, task: str = "", *, types: bool = True, **config: Any) -> Path:
    """Writes an encoder whose weights are random, and large enough that tokens matter to each other.

    Args:
        kind: one of ``FAMILIES`` or ``OWN_ATTENTION``.
        folder: where to write.
        task: ``MaskedLM`` or ``SequenceClassification`` for one with that head.
        types: whether the tokenizer's token types are for the model.
        config: values that differ from the family's.

    Returns:
        ``folder``.
    """
    values = {**{**FAMILIES, **OWN_ATTENTION}[kind], **config}
    auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        model = auto.from_config(transformers.AutoConfig.for_model(kind, **values), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.05))
    finally:
        torch.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer()),
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_input_names=["input_ids", *(["token_type_ids"] if types else [])],
    )
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _tokenizer() -> str:
    """A WordPiece tokenizer like BERT's, with its frame of special tokens and its token types, as JSON."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(inspect.getsource(pydoc).splitlines(), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer.to_str()


@made_once
def save_embedder(
    kind: str,
    folder: Path,
    *,
    pooling: str = "lasttoken",
    prompts: dict[str, str] | None = None,
    default: str | None = None,
    bare: bool = True,
    **config: Any,
) -> Path:
    """Writes a decoder made for embeddings, in the form of Qwen3-Embedding.

    Args:
        kind: one of ``tests.models_zoo``.
        folder: where to write.
        pooling: as its makers name it.
        prompts: by name.
        default: the name of the usual one.
        bare: the weights are those below the output layer.
        config: values that differ from the kind's.

    Returns:
        ``folder``; its tokenizer ends a text with the end-of-sequence token.
    """
    save_tiny(kind, folder, **config)
    if bare:
        named = json.loads((folder / "config.json").read_text())["architectures"]
        transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, "architectures": named}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair="$A $B <|end|>", special_tokens=[("<|end|>", end)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (path, name) in enumerate(
            [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        )
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": transformers.AutoConfig.from_pretrained(folder).hidden_size,
            f"pooling_mode_{pooling}": True,
            "include_prompt": True,
        },
        "config_sentence_transformers.json": {"prompts": prompts or {}, "default_prompt_name": default},
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder
