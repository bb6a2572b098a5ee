"""Keys and tensors that say nothing of what a model computes, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping

from server.errors import quoted
from server.models.gguf.file import GgufFile

_FILE = "it describes the file or where it comes from"

# Patterns of keys; ``{a}`` stands for the architecture's name.
_KEYS: Mapping[str, str] = {
    r"general\.(?!sampling\.).+": _FILE,
    r"quantize\..+": "how the file was quantized",
    r"imatrix\..+": "how the file was quantized",
    r"{a}\.rope\.scaling\.finetuned": "whether the model was trained with its scaling, which changes nothing",
    r"{a}\.tensor_data_layout": "the layout is that of llama.cpp in every file that it reads",
    r"{a}\.(vision|audio|mm)\..+": "of an image or sound encoder, which text does not pass",
}
# Keys of the architecture that, with this value, say that it does not have something.
_ABSENT: Mapping[str, object] = {
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attention.temperature_scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 0.0,
    "expert_count": 0,
    "expert_group_count": 0,
    "expert_group_used_count": 0,
    "expert_shared_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0.0,
    "leading_dense_block_count": 0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
}
_TENSORS: Mapping[str, str] = {
    r"blk\.\d+\.(attn_rot_embd|attn\.rot_embd)\.weight": "rotary frequencies, which the metadata gives",
    r"(v|mm|a)\..+": "of an image or sound encoder, which text does not pass",
}


def refuse_unused(
    file: GgufFile, architecture: str, unused: Mapping[str, str], layers: int, drafting: int
) -> None:
    """Refuses a file that says more than was read.

    Args:
        file: after everything was taken from it that is known.
        architecture: as the file calls it.
        unused: keys of this architecture that say nothing more, without its name.
        layers: of the model.
        drafting: layers after them that predict further tokens, which is not how Longspan generates.

    Raises:
        ValueError: a key or a tensor is left; the message names it.
    """
    patterns = [pattern.replace("{a}", re.escape(architecture)) for pattern in _KEYS]
    known = {f"{architecture}.{key}" for key in unused}
    keys = [
        key
        for key in file.metadata.unread()
        if key not in known and not _is_absent(file, architecture, key) and not _matches(patterns, key)
    ]
    if keys:
        raise ValueError(
            f"it says {keys[0]} = {quoted(file.metadata[keys[0]])}, and what that means for a {architecture} "
            f"model is unknown to Longspan{_others(keys)}"
        )
    further = [rf"blk\.{layer}\..+" for layer in range(layers, layers + drafting)]
    tensors = [name for name in file.unclaimed() if not _matches([*_TENSORS, *further], name)]
    if tensors:
        raise ValueError(
            f"it has the tensor {tensors[0]}, which {architecture} models of transformers don't"
            f"{_others(tensors)}"
        )


def _is_absent(file: GgufFile, architecture: str, key: str) -> bool:
    name = key.removeprefix(f"{architecture}.")
    return name in _ABSENT and name != key and file.metadata[key] == _ABSENT[name]


def _matches(patterns: list[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _others(names: list[str]) -> str:
    return f" ({len(names) - 1} more like this)" if len(names) > 1 else ""
