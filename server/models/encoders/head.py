"""The part of a model above its base: labels of whole texts, or tokens for masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

Chances = Callable[[torch.Tensor], torch.Tensor]
"""Makes probabilities of logits."""


def chances(config: Any) -> Chances | None:
    """How a config with labels means its logits; ``None`` for numbers that are no probabilities."""
    if config.problem_type == "regression":
        return None
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return torch.sigmoid
    return lambda logits: torch.softmax(logits, -1)


class Head:
    """A model's own code above its base, given vectors that were computed in a flattened batch.

    Args:
        model: of transformers. A stand-in takes its base's place, which is still good by itself.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = _Computed(model.base_model)
        setattr(model, model.base_model_prefix, self._base)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32: ``[labels]`` of a text, or ``[tokens, vocabulary]``.

        Args:
            hidden: ``[tokens, size]``, all of a text for labels; for masks those of the masks are enough.
        """
        self._base.hidden = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        return self._model(input_ids=ids).logits[0].float()


class _Computed(nn.Module):
    """Stands for a base whose vectors are known already; its pooler is the base's own."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.embeddings = getattr(base, "embeddings", None)  # DeBERTa's head for masks multiplies by them
        self._pooler = getattr(base, "pooler", None)
        self._activation = getattr(base, "pooler_activation", None)  # ALBERT's pooler is a bare linear layer
        self.hidden = torch.empty(0)

    def forward(self, *_: Any, **__: Any) -> Any:
        """The output that the base would return."""
        pooled = None
        if self._pooler is not None and self._activation is not None:
            pooled = self._activation(self._pooler(self.hidden[:, 0]))
        elif self._pooler is not None:
            pooled = self._pooler(self.hidden)
        output = BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=pooled)
        output.global_attentions = None  # which Longformer's heads hand on
        return output
