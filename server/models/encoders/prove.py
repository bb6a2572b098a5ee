"""Proves at start-up that an encoder in batches computes what transformers does text by text."""

from __future__ import annotations

import logging
from typing import Any

import torch

from server.errors import RefusedError
from server.models.encoders.encoder import Encoder
from server.models.encoders.head import Head

log = logging.getLogger("longspan.models")

# The largest difference, in standard deviations of the vectors. In float32 the order of sums makes 1e-5,
# and a position, a type or a text that is mixed up 0.01 and more.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
_USUAL = 150
# A reach is seen in texts longer than it, by three times where it is small.
_BEYOND = 500


def proof_texts(vocabulary: int, longest: int, reach: int) -> list[list[int]]:
    """Texts of random tokens: of one token, two of one length, and one longer than the model's reach."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 7, 7, max(_USUAL, min(3 * reach, reach + _BEYOND))]
    lengths = [min(length, longest) for length in lengths]
    return [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def compute_own(model: Any, texts: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """transformers' own forward of a whole model, one text at a time.

    Args:
        model: as transformers made it.
        texts: ascending by length.

    Returns:
        Of each text the vectors below the head ``[tokens, size]``, and the head's logits, if there is one:
        ``[labels]`` or ``[tokens, vocabulary]``.
    """
    hidden: list[torch.Tensor] = []

    def note(*called: Any) -> None:
        hidden.append(called[-1].last_hidden_state[0].float())

    hook = model.base_model.register_forward_hook(note)
    try:
        # The longest first: BigBird would see it by other rules after a short one.
        outputs = [model(input_ids=torch.tensor([text], device=model.device)) for text in reversed(texts)]
    finally:
        hook.remove()
    with_head = model.base_model is not model
    logits = [output.logits[0].float() for output in reversed(outputs)] if with_head else None
    return hidden[::-1], logits


def check_head(
    head: Head, hidden: list[torch.Tensor], own: list[torch.Tensor], dtype: torch.dtype, architecture: str
) -> None:
    """Compares what a head makes of transformers' own vectors with transformers' own logits.

    Raises:
        RefusedError: they differ.
    """
    wrong = max(
        float((head.logits(text.to(dtype)) - logits).abs().max() / (1 + logits.abs().max()))
        for text, logits in zip(hidden, own, strict=True)
    )
    if not wrong <= _TOLERANCE[dtype]:
        raise RefusedError(
            f"{architecture} cannot be served: its head makes other logits of a text's vectors than "
            f"transformers does (off by {wrong:.2g}); choose another model"
        )


def check(encoder: Encoder, texts: list[list[int]], own: list[torch.Tensor], architecture: str) -> None:
    """Compares one batch with what transformers computed.

    Raises:
        RefusedError: they differ.
    """
    served = encoder.hidden(texts, [[] for _ in texts])
    spread = torch.cat(own).std()
    wrong = max((float((a.float() - b).abs().max() / spread) for a, b in zip(served, own, strict=True)))
    if not wrong <= _TOLERANCE[encoder.base.dtype]:
        raise RefusedError(
            f"{architecture} cannot be served: in a batch without padding its vectors are not those that "
            f"transformers computes for each text (off by {wrong:.2g} standard deviations); choose another "
            "model"
        )
    log.info("in a batch without padding %s is as in transformers, within %.1g", architecture, wrong)
