"""How long a sequence a model can serve, from its config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server.engine.types import RefusedError

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def context_length(config: Any, max_context: int | None) -> int:
    """The most tokens of prompt and output together.

    Args:
        config: of the model; a multimodal model's text part counts.
        max_context: what the operator asks for; ``None`` for the model's own limit.

    Raises:
        RefusedError: it is more than the model's own limit, or neither is known.
    """
    text = config.get_text_config(decoder=True)
    values = (getattr(text, name, None) for name in _LENGTHS)
    own = next((value for value in values if isinstance(value, int) and value > 0), None)
    if own is None and max_context is None:
        raise RefusedError("the model's config does not say how long its context is; say it: --max-context N")
    if own is not None and max_context is not None and max_context > own:
        raise RefusedError(
            f"--max-context {max_context} is more than the model's own {own} positions; choose at most that"
        )
    return max_context or own or 0


def check_rope(config: Any, length: int) -> None:
    """Refuses a context in which rotary frequencies would depend on how long sequences are.

    transformers takes the frequencies of some kinds from the largest position in the whole batch, so one
    request would change another's answer, and keys in the cache would no longer fit. ``longrope`` does so
    beyond the original length. ``dynamic`` does so beyond ``max_position_embeddings``, where no context
    reaches (``context_length``), so it is served.

    Args:
        config: of the model; a multimodal model's text part counts.
        length: the context length.

    Raises:
        RefusedError: the context is longer than the range in which the frequencies stay the same.
    """
    text = config.get_text_config(decoder=True)
    for rope in _ropes(getattr(text, "rope_parameters", None)):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and original is not None and length > original:
            raise RefusedError(
                "the model's rotary embedding (longrope) changes its frequencies when the longest sequence "
                f"of a batch passes {original} tokens, so one request would change another's answer; "
                f"serve it within that length: --max-context {original}"
            )


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """The settings of every rotary embedding: some models have one, some one per type of layer."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        else:
            for value in parameters.values():
                yield from _ropes(value)
