"""The token that Longformer's kind of attention lets see all tokens, and be seen by all."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def first_token_global(module: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a forward is given so that the first token of each text has global attention.

    Args:
        module: an encoder, or a model with one.
        ids: int64 ``[texts, length]``.

    Returns:
        Arguments of the forward; none where its attention has no global tokens.
    """
    if "global_attention_mask" not in inspect.signature(module.forward).parameters:
        return {}
    mask = torch.zeros_like(ids)
    mask[:, 0] = 1
    return {"global_attention_mask": mask}
