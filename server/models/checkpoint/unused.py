"""Tensors that checkpoints hold and that say nothing about what a language model computes.

Every row has its reason. A tensor that the model does not take and that is not here refuses the model.
"""

from __future__ import annotations

import re
from typing import Any

from server.models.checkpoint.files import Stored

_VISION = "images are not served"
_AUDIO = "sound is not served"
_ROTARY = "rotary frequencies are computed from the config"
_MASK = "causal masks are computed"
_DRAFT = "layers that predict further tokens are not used"
_HEADS = "heads of a pretraining task, and the pooler before them, are not served"
_CACHE = "scales of an 8-bit KV cache, which is not kept so"

# Names anywhere in the tensor's dotted path.
_PARTS = {
    _VISION: (
        "vision_tower|vision_model|vision_encoder|vision_backbone|vision_embed_tokens|vision_projection|visual"
        "|multi_modal_projector|multimodal_projector|mm_projector|image_newline|img_processor|embed_vision"
        "|vision_embedder|vision_projector|image_encoder|image_projector|vqmodel"
    ),
    _AUDIO: (
        "audio_tower|audio_model|audio_encoder|embed_audio|audio_projector|audio_embed|talker|token2wav|code2wav"
    ),
    _HEADS: "pooler|seq_relationship|sop_classifier|discriminator_predictions",
    _DRAFT: r"mtp|mtp_\w+|medusa_heads?",
}
_ENDS = {
    _ROTARY: r"(?:\w*rotary\w*|rope)\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)",
    "positions are counted": "position_ids",
    "sinusoidal positions are computed": r"embed_positions\.(?:weights|_float_tensor)",
    "a version of the format": r"(?:en|de)coder\.version",
    _CACHE: r"(?:self_attn|attn|attention|[kv]_proj)\.(?:k|v|kv|q|prob)(?:_cache)?_scale",
}
_MASK_NAMES = re.compile(
    r"(?:attn|attention|crossattention)\.(?:attention\.)?(?:bias|masked_bias|causal_mask)$"
)

_T5_CROSS = (
    r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.",
    "attention to a source has no bias by distance",
)
# By model type, tensors that makers left in their files though their own code does not use them.
_LEFT_OVER = {
    **dict.fromkeys(("t5", "mt5", "longt5"), _T5_CROSS),
    "axk1": (r"mlp\.post_mlp_layernorm\.", "dense layers have no norm after their MLP"),
}

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)\.")
_SHARED_KEYS = re.compile(r"self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\.")
_DRAFT_COUNT = re.compile(r"(?:nextn|mtp).*(?:layers|modules|predict)|num_(?:nextn|mtp)")


def reason_unused(name: str, stored: Stored | None, config: Any, *, dropped: bool = False) -> str | None:
    """Why a tensor that a model did not take says nothing about what it computes.

    Args:
        name: the tensor's, in the file or in the model.
        stored: what the file says of it.
        config: the model's.
        dropped: transformers' own class of the model drops it silently.

    Returns:
        The reason, or ``None`` where there is none.
    """
    for reason, parts in _PARTS.items():
        if re.search(rf"(?:^|\.)(?:{parts})(?:\.|$)", name):
            return reason
    for reason, ends in _ENDS.items():
        if re.search(rf"(?:^|\.)(?:{ends})$", name):
            return reason
    if _MASK_NAMES.search(name) and stored is not None and _is_mask(stored.shape):
        return _MASK
    pattern, reason = _LEFT_OVER.get(config.model_type, (None, ""))
    if pattern and re.search(pattern, name):
        return reason
    return _of_layer(name, config, dropped)


def layer_beyond(name: str, config: Any) -> int | None:
    """The number of a tensor's layer, if the config has fewer."""
    found = _LAYER.search(name)
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if found is None or not isinstance(count, int) or int(found[1]) < count:
        return None
    return int(found[1])


def _is_mask(shape: tuple[int, ...]) -> bool:
    """Whether it is a mask of every query against every key, or the one number of hidden ones."""
    return shape in ((), (1,)) or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])


def _of_layer(name: str, config: Any, dropped: bool) -> str | None:
    text = config.get_text_config(decoder=True)
    beyond = layer_beyond(name, config)
    # Where the config says nothing of them, a class of transformers knows of one right behind the last.
    if beyond is not None and beyond < text.num_hidden_layers + max(_draft_layers(text), int(dropped)):
        return _DRAFT
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    found = _LAYER.search(name) if shared and beyond is None else None
    if found and int(found[1]) >= text.num_hidden_layers - shared and _SHARED_KEYS.search(name):
        return "layers that share another's keys and values have none of their own"
    return None


def _draft_layers(config: Any) -> int:
    counts = [
        value
        for key, value in config.to_dict().items()
        if _DRAFT_COUNT.search(key) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return max(counts, default=0)
