"""A model that is ready to be served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attention.rope import LengthRope
from attention.types import LayerSpec

if TYPE_CHECKING:  # it imports transformers, which a packed decoder does without
    from server.models.halves import Halves


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready for ``attention.forward`` with a ``Step``.

    Attributes:
        model: the causal language model, in evaluation mode, its parameters frozen.
        layers: the requirements of its attention layers, in order.
        architecture: its class in transformers.
        parameters: number of weights, tied ones counted once.
        vocabulary_size: number of logits.
        context_length: the most tokens of prompt and output together.
        dtype: dtype of weights and computation.
        rope: its rotary embeddings, if their frequencies depend on lengths.
        mapped_bytes: of weights that lie in a file's memory map, so that they count as free while they are
            not.
        halves: of an encoder-decoder, whose ``layers`` are its decoder's, and whose context has room for a
            source at its longest, ``filled``, and a target.
        unpacked: why it is not one packed model, as part of a sentence; empty if it is.
    """

    model: Any
    layers: list[LayerSpec]
    architecture: str
    parameters: int
    vocabulary_size: int
    context_length: int
    dtype: torch.dtype
    rope: LengthRope | None = None
    mapped_bytes: int = 0
    unpacked: str = ""
    halves: Halves | None = None
