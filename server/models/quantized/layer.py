"""A fused decoder layer of few bits on the CPU: two calls of the operator, and attention between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attention.backends import UnsupportedError
from attention.forward import Attend
from server.models.fused import FusedLayer
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Stage, run
from server.models.quantized.workspace import Workspace

# By name, since importing the one of transformers takes longer than all else in a start.
_SILU = ("SiLU", "SiLUActivation")


class QuantizedLayer(nn.Module):
    """What ``FusedLayer`` computes, with packed weights.

    Args:
        fused: a layer that ``fits``.
        workspace: shared by the model's layers.

    Attributes:
        heads: query heads, KV heads, size of a head.
        between: numbers of a row between gate and up projection and the last one.
    """

    def __init__(self, fused: FusedLayer, workspace: Workspace) -> None:
        super().__init__()
        assert self.fits(fused)
        self.layer_idx, self.features, self.workspace = fused.layer_idx, fused.features, workspace
        self.heads = fused.query_heads, fused.kv_heads, fused.head_size
        # What the stages point to.
        self.linears = nn.ModuleList(_linears(fused))
        head_norms: list[Any] = list(fused.head_norms)
        norms = [fused.attention_norm, fused.mlp_norm, *head_norms]
        self.norms = nn.ParameterList(norm.weight for norm in norms)
        addresses: list[int | None] = [norm.weight.data_ptr() for norm in norms]
        before, after, query, key = [*addresses, None, None][:4]
        qkv, o, gate_up, down = _linears(fused)
        self._before = (Stage * 1)(
            qkv.stage(
                norm=before,
                epsilon=fused.attention_norm.epsilon,
                query_heads=fused.query_heads,
                key_heads=fused.kv_heads,
                head_size=fused.head_size,
                query_norm=query,
                key_norm=key,
                head_epsilon=head_norms[0].epsilon if head_norms else 0.0,
            )
        )
        self.between: int = gate_up.out_features
        self._after = (Stage * 3)(
            o.stage(added=1),
            gate_up.stage(norm=after, epsilon=fused.mlp_norm.epsilon),
            down.stage(gated=1, added=1, input_stride=gate_up.out_features),
        )

    @property
    def stages(self) -> list[Stage]:
        """What it computes, in order; attention comes after the first. Where rows lie is not set."""
        return [*self._before, *self._after]

    @staticmethod
    def fits(fused: FusedLayer) -> bool:
        """Its linear layers are packed, and the operator knows what goes between them."""
        return (
            type(fused.activation).__name__ in _SILU
            and all(isinstance(linear, QuantizedLinear) for linear in _linears(fused))
            and len({norm.epsilon for norm in fused.head_norms}) <= 1
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        longspan: Attend | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """See ``FusedLayer.forward``."""
        if longspan is None:
            raise UnsupportedError("a model of few bits computes with the keyword argument longspan only")
        assert position_embeddings is not None
        assert hidden_states.is_contiguous()
        cosines, sines = (angles.contiguous() for angles in position_embeddings)
        rows, hidden = hidden_states.shape[1], hidden_states.data_ptr()
        heads = self.workspace.heads(rows, *self.heads)
        before, (o, gate_up, down) = self._before[0], self._after
        before.input, before.output = hidden, heads.rows.data_ptr()
        before.cosines, before.sines = cosines.data_ptr(), sines.data_ptr()
        run(self._before, rows)

        query, key, value = (part.transpose(0, 1)[None] for part in heads[1:])
        attended = longspan.attend(self, query, key, value, attention_mask, self.features).contiguous()

        between = self.workspace.rows(rows, gate_up.outputs).data_ptr()
        o.input, o.output = attended.data_ptr(), hidden
        gate_up.input, gate_up.output = hidden, between
        down.input, down.output = between, hidden
        run(self._after, rows)
        return hidden_states


def _linears(fused: FusedLayer) -> list[Any]:
    return [fused.qkv, fused.o, fused.gate_up, fused.down]
