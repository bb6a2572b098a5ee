"""How long a sequence a model can serve, from its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from server.errors import RefusedError
from server.models.rope import RopeScaling, apply_scaling, ropes

log = logging.getLogger("longspan.models")

LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
)
"""The names that configs have for the length of the context."""

# The largest that the API can say. Some configs have 10**30 for "no limit".
_MOST = 2**31 - 1


def context_length(
    config: Any, max_context: int | None, *, reach: int | None = None, scaling: RopeScaling | None = None
) -> int:
    """The most tokens of prompt and output together.

    Args:
        config: of the model; a multimodal model's text part counts. ``scaling`` is written into it.
        max_context: what the operator asks for; ``None`` for the model's own limit.
        reach: of the attention pattern: distances never grow beyond it, so that it is what has to fit.
        scaling: how the operator wants rotary positions to be stretched; ``None`` for as the model says.

    Raises:
        RefusedError: it is more than the model's own limit, neither is known, or the scaling can't be had.
    """
    own = _own_length(config) if scaling is None else apply_scaling(config, scaling)
    if own is None and max_context is None:
        raise RefusedError("the model's config does not say how long its context is; say it: --max-context N")
    steady = min(filter(None, (own, steady_length(config))), default=None)
    if reach is not None and steady is not None and reach > steady:
        raise RefusedError(
            f"with positions=cache, sinks and window together are {reach} positions, more than the {steady} "
            "that the model can tell apart; choose a smaller window"
        )
    if own is not None and max_context is not None and max_context > own and reach is None:
        if scaling is None or scaling.kind != "default":
            rotary = " or stretch them by --rope-scaling" if scaling is None and any(ropes(config)) else ""
            raise RefusedError(
                f"--max-context {max_context} is more than the model's own {own} positions; "
                f"choose at most that{rotary}"
            )
        log.warning(
            "--max-context %d is beyond the model's own %d positions, which --rope-scaling default does not "
            "stretch: expect answers to become worse from there on",
            max_context,
            own,
        )
    return min(max_context or own or 0, _MOST)


def check_positions(max_context: int | None, own: int) -> None:
    """Refuses texts of more tokens than a model has positions.

    Args:
        max_context: what the operator asks for; ``None`` for the model's own limit.
        own: positions that the model has.

    Raises:
        RefusedError: it is more than that.
    """
    if max_context is not None and max_context > own:
        raise RefusedError(
            f"--max-context {max_context} is more than the model's own {own} positions; choose at most that"
        )


def steady_length(config: Any) -> int | None:
    """Up to which length rotary frequencies don't depend on it; ``None`` if they never do."""
    text = config.get_text_config(decoder=True)
    lengths = []
    for rope in ropes(config):
        if rope["rope_type"] == "dynamic":
            lengths.append(text.max_position_embeddings)
        elif rope["rope_type"] == "longrope":
            lengths.append(rope["original_max_position_embeddings"])
    return min(lengths, default=None)


def _own_length(config: Any) -> int | None:
    """The length that the checkpoint was made for, its own stretching of positions included."""
    text = config.get_text_config(decoder=True)
    values = (getattr(text, name, None) for name in LENGTHS)
    own = next((value for value in values if isinstance(value, int) and value > 0), None)
    if own is None:
        return None
    said = getattr(text, "max_sequence_length", None)
    return max([own, *(_stretched(rope, own, said) for rope in ropes(config, far=True))])


def _stretched(rope: Mapping[str, Any], own: int, said: Any) -> int:
    """The factor by which a rotary embedding stretches a config's length.

    Only two kinds are added to a config whose length stays as it was: ``yarn`` for all of Qwen2.5, Qwen3 and
    their like, and ``dynamic``, whose formula stretches from that length on. With the others the length is
    that of the stretched model: Llama 3.2 was made for 131,072 tokens, though a factor of 32 would reach
    262,144 from its first 8,192; Gemma 3 for 131,072 with a linear factor of 8. Unless the config says
    otherwise: Vicuna 16k has 4,096, a linear factor of 4, and ``max_sequence_length`` for the product.
    """
    factor = rope.get("factor") or 1
    if rope["rope_type"] == "linear" and said == factor * own:
        return int(said)
    if rope["rope_type"] == "yarn":
        return int(factor * (rope.get("original_max_position_embeddings") or own))
    return int(factor * own) if rope["rope_type"] == "dynamic" else own
