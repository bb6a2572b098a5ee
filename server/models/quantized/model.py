"""A whole language model of few bits: what transformers computes around the decoder layers, and no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from attention.forward import Attend
from attention.hook import Step
from server.models.fused import Norm
from server.models.limits import LENGTHS
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Stage, run
from server.models.quantized.rotary import OwnRotary, RotaryTable
from server.models.quantized.stack import QuantizedStack
from server.models.quantized.workspace import Workspace

# Rows of logits whose memory is kept: for more, the time that new memory takes is nothing beside the rest.
_KEPT_ROWS = 16


class Logits(NamedTuple):
    """The result of a forward, named as in transformers."""

    logits: torch.Tensor


class Config(SimpleNamespace):
    """The part of a transformers config that serving reads: lengths, rotary parameters, vocabulary size."""

    NAMES = (*LENGTHS, "vocab_size", "rope_parameters")

    def get_text_config(self, decoder: bool = False) -> Config:
        """Itself: it has no other parts."""
        return self


class QuantizedModel(nn.Module):
    """Embedding, rotary angles, packed decoder layers, RMSNorm and output layer.

    ``attention.forward`` calls it as it does a causal language model of transformers.

    Args:
        embedding: ids ``[T]`` to rows ``[T, C]``.
        rotary: angles by position.
        decoder: the layers.
        norm: before the output layer.
        head: the output layer; one that can't be packed without loss may be of floats.
        config: of the model.
    """

    def __init__(
        self,
        embedding: nn.Module,
        rotary: RotaryTable | OwnRotary,
        decoder: QuantizedStack,
        norm: Norm,
        head: QuantizedLinear | nn.Linear,
        config: Config,
    ) -> None:
        super().__init__()
        self.embedding, self.rotary, self.decoder = embedding, rotary, decoder
        self.norm, self.head, self.config = norm, head, config
        self._logits = Workspace()
        if isinstance(head, QuantizedLinear):
            self._last = (Stage * 1)(head.stage(norm=norm.weight.data_ptr(), epsilon=norm.epsilon))

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return torch.float32

    def get_output_embeddings(self) -> QuantizedLinear | nn.Linear:
        """The output layer, as transformers calls it."""
        return self.head

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        longspan: Attend,
        logits_to_keep: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> Logits:
        """As ``attention.forward`` calls a model of transformers: attention is asked for layer by layer.

        Args:
            input_ids: int64 ``[1, T]``.
            position_ids: int64 ``[1, T]``.
            longspan: computes attention.
            logits_to_keep: int64 ``[N]``, the rows whose logits are wanted; ``None`` for all.
            use_cache: false; the cache is for ``longspan`` to know.
        """
        assert not use_cache
        given = longspan.given if isinstance(longspan, Step) else None
        hidden = self.decoder.run(
            self.embedding(input_ids[0]), self.rotary.at(position_ids[0]), given, longspan
        )
        return Logits(self.output(hidden, logits_to_keep)[None])

    def output(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Logits ``[N, V]``, good until the next call.

        Args:
            hidden: float32 ``[T, C]``, as the last layer gave it.
            rows: int64 ``[N]``, those whose logits are wanted; ``None`` for all.
        """
        wanted = hidden if rows is None else hidden[rows]
        if not isinstance(self.head, QuantizedLinear):
            logits: torch.Tensor = self.head(self.norm(wanted))
            return logits
        shape = len(wanted), self.head.out_features
        logits = self._logits.rows(*shape) if len(wanted) <= _KEPT_ROWS else torch.empty(shape)
        stage = self._last[0]
        stage.input, stage.output = wanted.data_ptr(), logits.data_ptr()
        run(self._last, len(wanted))
        return logits
