"""A decoder layer of few bits on the CPU: two calls of the operator, and attention between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from server.models.fused import Norm
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Stage
from server.models.quantized.workspace import Workspace

LINEARS = ("qkv", "o", "gate_up", "down")
"""A layer's linear layers, in the order in which they compute."""


class LayerParts(NamedTuple):
    """The parts of a layer; see ``FusedLayer`` for what it computes.

    Attributes:
        layer_idx: the layer's index, for attention.
        features: further arguments of attention.
        heads: query heads, KV heads, size of a head.
        norms: before attention and before the MLP; and of each head of queries and of keys, or none.
        linears: as ``LINEARS`` says.
    """

    layer_idx: int
    features: Mapping[str, Any]
    heads: tuple[int, int, int]
    norms: Sequence[Norm]
    linears: Sequence[QuantizedLinear]


class QuantizedLayer(nn.Module):
    """The operator's stages of a layer, whose activation is SiLU; ``QuantizedStack`` runs them.

    Args:
        parts: of the layer; the head norms have one epsilon.
        workspace: shared by the model's layers.

    Attributes:
        layer_idx: the layer's index, for attention.
        features: further arguments of attention.
        heads: query heads, KV heads, size of a head.
        between: numbers of a row between gate and up projection and the last one.
        stages: what it computes, in order; attention comes after the first. Where rows lie is not set.
    """

    def __init__(self, parts: LayerParts, workspace: Workspace) -> None:
        super().__init__()
        self.layer_idx, self.features, self.workspace = parts.layer_idx, parts.features, workspace
        self.heads = query_heads, kv_heads, head_size = parts.heads
        # The stages point to these.
        self.linears, self.norms = nn.ModuleList(parts.linears), nn.ModuleList(parts.norms)
        qkv, o, gate_up, down = parts.linears
        before, after, *head_norms = parts.norms
        query, key = [norm.weight.data_ptr() for norm in head_norms] or (None, None)
        self.between = gate_up.out_features
        self.stages: list[Stage] = [
            qkv.stage(
                norm=before.weight.data_ptr(),
                epsilon=before.epsilon,
                query_heads=query_heads,
                kv_heads=kv_heads,
                head_size=head_size,
                query_norm=query,
                key_norm=key,
                head_epsilon=head_norms[0].epsilon if head_norms else 0.0,
            ),
            o.stage(added=1),
            gate_up.stage(norm=after.weight.data_ptr(), epsilon=after.epsilon),
            down.stage(gated=1, added=1, input_stride=gate_up.out_features),
        ]
