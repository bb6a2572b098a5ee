"""A whole language model of few bits: what transformers computes around the decoder layers, and no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from attention.forward import Attend
from server.models.fused import Norm, NotCommonError
from server.models.limits import LENGTHS
from server.models.quantized.embedding import packed_embedding
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Stage, run
from server.models.quantized.packing import Packed
from server.models.quantized.rotary import RotaryTable
from server.models.quantized.stack import QuantizedStack
from server.models.quantized.workspace import Workspace

# Rows of logits whose memory is kept: for more, the time that new memory takes is nothing beside the rest.
_KEPT_ROWS = 16

# Kinds of rotary embedding whose frequencies stay what they are at first.
_STEADY = ("default", "linear", "llama3", "yarn")


class Logits(NamedTuple):
    """What a forward gives, named as in transformers."""

    logits: torch.Tensor


class Config(SimpleNamespace):
    """What serving asks a config of transformers for: lengths, rotary parameters, size of the vocabulary."""

    NAMES = (*LENGTHS, "vocab_size", "rope_parameters")

    def get_text_config(self, decoder: bool = False) -> Config:
        """Itself: it has no other parts."""
        return self


class QuantizedModel(nn.Module):
    """Embedding, rotary angles, packed decoder layers, RMSNorm and packed output layer.

    ``attention.forward`` calls it as it does a causal language model of transformers.

    Args:
        embedding: ids ``[T]`` to rows ``[T, C]``.
        inv_freq: float32 ``[D / 2]``, radians per position.
        scaling: of cosines and sines.
        decoder: the layers.
        norm: before the output layer.
        head: the output layer.
        config: of the model.
    """

    inv_freq: torch.Tensor

    def __init__(
        self,
        embedding: nn.Module,
        inv_freq: torch.Tensor,
        scaling: float,
        decoder: QuantizedStack,
        norm: Norm,
        head: QuantizedLinear,
        config: Config,
    ) -> None:
        super().__init__()
        self.embedding, self.scaling, self.decoder = embedding, scaling, decoder
        self.norm, self.head, self.config = norm, head, config
        self.register_buffer("inv_freq", inv_freq)
        self.rotary = RotaryTable(inv_freq, scaling)
        self._logits = Workspace()
        self._last = (Stage * 1)(head.stage(norm=norm.weight.data_ptr(), epsilon=norm.epsilon))

    @classmethod
    def of(cls, model: Any) -> QuantizedModel:
        """The same model, from its parts.

        Args:
            model: of transformers, quantized. That the two compute the same, the caller has to prove.

        Raises:
            NotCommonError: it is made of other parts; the message says which.
        """
        stacks = [module for module in model.modules() if isinstance(module, QuantizedStack)]
        if len(stacks) != 1:
            raise NotCommonError(
                "its layers are not one native call, for which all must be of Llama's form and packed"
            )
        head, plain, base = model.get_output_embeddings(), model.get_input_embeddings(), model.get_decoder()
        if not isinstance(head, QuantizedLinear):
            raise NotCommonError("its output layer is not packed")
        if type(plain) is not nn.Embedding:
            raise NotCommonError(f"its embedding is a {type(plain).__name__}")
        ropes = [module for module in base.modules() if hasattr(module, "inv_freq")]
        if len(ropes) != 1 or getattr(ropes[0], "rope_type", None) not in _STEADY:
            raise NotCommonError("its rotary angles are not of one kind that stays")
        norm = getattr(base, "norm", None)
        if norm is None:
            raise NotCommonError(f"{type(base).__name__} has no norm after its layers")
        text = model.config.get_text_config(decoder=True)
        values = {name: getattr(text, name) for name in Config.NAMES if getattr(text, name, None) is not None}
        packed = Packed(head.bits, head.codes, head.scales, head.exact)
        return cls(
            embedding=packed_embedding(plain, packed),
            inv_freq=ropes[0].inv_freq.float(),
            scaling=float(ropes[0].attention_scaling),
            decoder=stacks[0],
            norm=Norm(norm),
            head=head,
            config=Config(**values),
        ).eval()

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.inv_freq.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        return torch.float32

    def get_output_embeddings(self) -> QuantizedLinear:
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
        hidden = self.decoder.run(self.embedding(input_ids[0]), self.rotary.at(position_ids[0]), longspan)
        return Logits(self.output(hidden, logits_to_keep)[None])

    def output(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Logits ``[N, V]``, good until the next call.

        Args:
            hidden: float32 ``[T, C]``, as the last layer gave it.
            rows: int64 ``[N]``, those whose logits are wanted; ``None`` for all.
        """
        wanted = hidden if rows is None else hidden[rows]
        shape = len(wanted), self.head.out_features
        logits = self._logits.rows(*shape) if len(wanted) <= _KEPT_ROWS else torch.empty(shape)
        stage = self._last[0]
        stage.input, stage.output = wanted.data_ptr(), logits.data_ptr()
        run(self._last, len(wanted))
        return logits
