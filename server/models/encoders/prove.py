"""Proves at start-up that an encoder in flattened batches computes what transformers does text by text."""

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


def proof_texts(vocabulary: int, longest: int, window: int) -> list[list[int]]:
    """Texts of random tokens: of one token, two of one length, and one longer than the model's window."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 7, 7, min(longest, max(_USUAL, 3 * window))]
    lengths = [min(length, longest) for length in lengths]
    return [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def compute_own(base: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """transformers' own forward, one text at a time: of each ``[tokens, size]``."""
    return [
        base(input_ids=torch.tensor([text], device=base.device)).last_hidden_state[0].float()
        for text in texts
    ]


@torch.inference_mode()
def own_logits(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """transformers' own logits, one text at a time: of each ``[labels]`` or ``[tokens, vocabulary]``."""
    return [model(input_ids=torch.tensor([text], device=model.device)).logits[0].float() for text in texts]


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
    """Compares one flattened batch with what transformers computed.

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
