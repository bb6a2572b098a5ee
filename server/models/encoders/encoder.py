"""The interface by which the vectors of texts are computed, whatever the model."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch


class Encoder(ABC):
    """A model of transformers below its head.

    Args:
        base: the model.

    Attributes:
        token_types: how many the model knows; 0 if it takes none.
        attention: what a token sees: ``bidirectional``, ``causal``, or the model's ``own`` rule.
        attention_reason: why, in words.
        kernel: what computes attention.
        executor: how texts become batches.
        executor_reason: the same in words.
    """

    attention: str
    attention_reason: str
    kernel: str
    executor: str
    executor_reason: str

    def __init__(self, base: Any) -> None:
        self.base = base
        takes_types = "token_type_ids" in inspect.signature(base.forward).parameters
        self.token_types: int = getattr(base.config, "type_vocab_size", 0) if takes_types else 0

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.base.device

    @property
    def vocabulary_size(self) -> int:
        """Tokens that it knows."""
        count: int = self.base.get_input_embeddings().num_embeddings
        return count

    @abstractmethod
    def hidden(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The vectors of all tokens, of each text ``[tokens, size]``.

        Args:
            texts: token ids, at least one each. Texts of one length should be neighbors.
            types: token types for each text, as many as tokens, or none where all are 0.
        """
