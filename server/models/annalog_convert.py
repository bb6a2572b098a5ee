"""ANNalog's weights to a Hugging Face folder of transformers' Marian, whose layers compute the same.

A program: ``python -m server.models.annalog_convert FILE TARGET``; for failures see
``server.models.conversions``. Both are Transformers as of Vaswani et al. 2017: normalization behind each
sum, ReLU, embeddings times the root of their size. ANNalog's positions are learned, which is no difference
to a table that is read from the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from server.models.conversions import arguments, writing

TOKENS = (
    *("<unk>", "<pad>", "<sos>", "<eos>", "c", "C", "(", ")", "1", "O", "2", "=", "N", "3", "n", "4", "F"),
    *("-", "[C@H]", "[C@@H]", "Cl", "/", "S", "[nH]", "5", "o", "s", "[C@]", "#", "[C@@]", "Br", "\\"),
    *("[O-]", "[N+]", "6", "[n+]", "[S+]", "7", "[N-]", "[C-]", "[O]", "[s+]", "[S@+]", ".", "8"),
    *("[S@@+]", "[o+]", "[n-]", "[N@@+]", "[N@]", "[N@@]", "[N@+]", "[S@@]", "[S@]", "9", "[C+]", "%10"),
    *("%11", "%12"),
)
"""Its vocabulary, in the order of its ids: atoms, bonds, branches and rings of SMILES."""
_UNKNOWN, _PADDING, _START, _END = range(4)
_POSITIONS, _SIZE, _LAYERS, _HEADS, _INNER = 102, 256, 3, 8, 512
# ANNalog's own parts of a text: what is in brackets, rings of two digits, two atoms of two letters.
_PARTS = r"\[[^\]]*\]|%\d{2}|Br|Cl|[\s\S]"
_RENAMED = (
    ("self_attention.fc_o", "self_attn.out_proj"),
    ("encoder_attention.fc_o", "encoder_attn.out_proj"),
    *((f"self_attention.fc_{one}", f"self_attn.{one}_proj") for one in "qkv"),
    *((f"encoder_attention.fc_{one}", f"encoder_attn.{one}_proj") for one in "qkv"),
    ("enc_attn_layer_norm", "encoder_attn_layer_norm"),
    ("ff_layer_norm", "final_layer_norm"),
    ("positionwise_feedforward.fc_", "fc"),
    ("tok_embedding", "embed_tokens"),
    ("pos_embedding", "embed_positions"),
)


def convert(file: Path, target: Path) -> None:
    """Writes the folder.

    Args:
        file: the state dict, as the wheel has it.
        target: where to write; made if missing.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)
    with writing():
        target.mkdir(parents=True, exist_ok=True)
        save_file(
            {_name(name): _weight(name, weight) for name, weight in state.items()},
            target / "model.safetensors",
            metadata={"format": "pt"},
        )
        _tokenizer().save(str(target / "tokenizer.json"))
        for name, content in (
            ("config.json", _config()),
            ("generation_config.json", _generation()),
            ("tokenizer_config.json", _tokenizer_config()),
        ):
            (target / name).write_text(json.dumps(content, indent=2))


def _name(own: str) -> str:
    if own == "decoder.fc_out.weight":
        return "lm_head.weight"
    if own == "decoder.fc_out.bias":
        return "final_logits_bias"
    for before, after in _RENAMED:
        own = own.replace(before, after)
    return f"model.{own}"


def _weight(own: str, weight: torch.Tensor) -> torch.Tensor:
    return weight[None].contiguous() if own == "decoder.fc_out.bias" else weight


def _generation() -> dict[str, Any]:
    return {
        "bos_token_id": _START,
        "decoder_start_token_id": _START,
        "eos_token_id": _END,
        "pad_token_id": _PADDING,
        "max_length": _POSITIONS,
    }


def _config() -> dict[str, Any]:
    halves = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in (("layers", _LAYERS), ("attention_heads", _HEADS), ("ffn_dim", _INNER))
    }
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "dtype": "float32",
        "vocab_size": len(TOKENS),
        "decoder_vocab_size": len(TOKENS),
        "d_model": _SIZE,
        **halves,
        "activation_function": "relu",
        "scale_embedding": True,
        "max_position_embeddings": _POSITIONS,
        "tie_word_embeddings": False,
        "share_encoder_decoder_embeddings": False,
        **{name: value for name, value in _generation().items() if name != "max_length"},
        "forced_eos_token_id": None,
    }


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PARTS), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in TOKENS[: _END + 1]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<sos> $A <eos>", special_tokens=[("<sos>", _START), ("<eos>", _END)]
    )
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _POSITIONS,
        "unk_token": TOKENS[_UNKNOWN],
        "pad_token": TOKENS[_PADDING],
        "bos_token": TOKENS[_START],
        "eos_token": TOKENS[_END],
        "separate_vocabs": False,
        "clean_up_tokenization_spaces": False,
    }


def main() -> None:
    """The program."""
    source, target = arguments()
    try:
        convert(source, target)
    except Exception as error:
        sys.exit(" ".join(str(error).split()) or type(error).__name__)


if __name__ == "__main__":
    main()
