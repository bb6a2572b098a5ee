"""Folders of a Llama model with tokenizers in other forms than ``tokenizer.json``."""

from __future__ import annotations

import base64
import inspect
import json
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.models_zoo import save_tiny

Encode = Callable[[str], list[int]]
_PIECES = 512


def _fast(folder: Path, **config: Any) -> Encode:
    save_tiny("llama", folder, **config)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: own.encode(text).ids


def _bare(folder: Path, **config: Any) -> Encode:
    """No tokenizer at all."""
    encode = _fast(folder, **config)
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return encode


def _slow(folder: Path) -> Encode:
    """GPT-2's two files, of which transformers makes the same tokenizer."""
    encode = _fast(folder)
    model: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())["model"]
    _bare(folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    values = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|text|>",
        "eos_token": "<|end|>",
        "unk_token": "<|end|>",
        "additional_special_tokens": ["<|start|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return encode


def _sentencepiece(folder: Path) -> Encode:
    """``tokenizer.model`` alone, as the first Llama had it."""
    import sentencepiece

    _bare(folder, vocab_size=_PIECES)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(pydoc).splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=_PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    values = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda text: [own.bos_id(), *own.encode(text)]


def _tiktoken(folder: Path) -> Encode:
    """``tokenizer.model`` in tiktoken's form, one token of bytes and its rank a line."""
    encode = _bare(folder)
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return encode


# By name: what writes the folder and gives what encodes right, what is expected, and the module it takes.
FORMS: tuple[tuple[Any, ...], ...] = (
    ("tokenizer.json", _fast),
    ("vocab.json and merges.txt (a slow tokenizer)", _slow),
    ("tokenizer.model (sentencepiece) alone", _sentencepiece, "exact", "sentencepiece"),
    ("tokenizer.model in tiktoken's form, without a pattern", _tiktoken, r"tokenizer\.model"),
    ("no tokenizer", _bare),
)
