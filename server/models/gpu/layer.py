"""A fused decoder layer on a GPU: Triton programs between the products, few launches in all."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import nn

from attention.forward import Attend
from attention.kernels.base import power_of_two
from server.models.fused import FusedLayer, Norm

# By name, since what they compute is proven before a layer is used; whether it is GELU.
_ACTIVATIONS = {
    "SiLU": False,
    "SiLUActivation": False,
    "GELUTanh": True,
    "PytorchGELUTanh": True,
    "NewGELUActivation": True,
}

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)

# Numbers that one program works on, where a row is cut.
_NUMBERS = 1024


class Adding(Protocol):
    """A linear layer other than torch's own, which can add its product to what is there."""

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """Adds what it makes of ``x`` ``[T, K]`` to ``total`` ``[T, N]``, in place."""


class TritonLayer(nn.Module):
    """What ``FusedLayer`` computes, to rounding, in about 11 launches, attention's and the cache's included.

    Numbers between two products stay in float32 until they are stored; what the layer adds to its input is
    added by the products themselves. Launches depend on shapes and strides alone, so they can be captured.

    Args:
        fused: a layer without ``obstacle``. Its linear layers may be replaced later, by such that are
            ``Adding``; without ``longspan`` it computes as before.
    """

    def __init__(self, fused: FusedLayer) -> None:
        super().__init__()
        self.fused = fused

    @staticmethod
    def obstacle(fused: FusedLayer) -> str | None:
        """Why the programs can't compute what a layer does; ``None`` if they can."""
        activation = type(fused.activation).__name__
        if activation not in _ACTIVATIONS:
            return f"their activation is {activation}"
        formats = {parameter.dtype for parameter in fused.parameters()}
        if len(formats) > 1 or not formats <= {*_FORMATS}:
            return f"their weights are {', '.join(sorted(map(str, formats)))}"
        if len({norm.epsilon for norm in _head_norms(fused)}) > 1:
            return "queries and keys have norms of different epsilon"
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        longspan: Attend | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """See ``FusedLayer.forward``."""
        fused = self.fused
        if longspan is None:
            own: torch.Tensor = fused(hidden_states, attention_mask, position_embeddings, **more)
            return own
        assert position_embeddings is not None
        hidden = hidden_states[0]
        rows = fused.qkv(_normed(hidden, fused.attention_norm))
        _rotate(rows, fused, *position_embeddings)
        sizes = [fused.query_heads, fused.kv_heads, fused.kv_heads]
        heads = rows.view(len(rows), -1, fused.head_size).split(sizes, dim=1)
        queries, keys, values = (part.transpose(0, 1)[None] for part in heads)
        attended = longspan.attend(fused, queries, keys, values, attention_mask, fused.features)
        _add(hidden, fused.o, attended.reshape(len(hidden), -1))

        gates = fused.gate_up(_normed(hidden, fused.mlp_norm))
        _add(hidden, fused.down, _gated(gates, fused.activation))
        return hidden_states


def _add(total: torch.Tensor, linear: nn.Module, x: torch.Tensor) -> None:
    """Adds what the linear layer makes of ``x`` to ``total``, in place."""
    if not isinstance(linear, nn.Linear):
        cast(Adding, linear).add_to(total, x)
        return
    total.addmm_(x, linear.weight.t())
    if linear.bias is not None:
        total += linear.bias


def _normed(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """RMSNorm of ``[T, C]``."""
    count, size = rows.shape
    output = rows.new_empty(count, size)
    block = power_of_two(size)
    with torch.cuda.device_of(rows):
        _code().norm[(count,)](
            rows=rows,
            row_stride=rows.stride(0),
            weight=norm.weight,
            output=output,
            epsilon=norm.epsilon,
            SIZE=size,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return output


def _rotate(rows: torch.Tensor, fused: FusedLayer, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """Turns queries and keys by their angles, in place, after norms of their own if the layer has such.

    Args:
        rows: ``[T, (H + 2 * Hkv) * D]``: queries, keys and values.
        fused: of which layer.
        cosines: ``[1, T, D]``.
        sines: likewise.
    """
    heads, half = fused.query_heads + fused.kv_heads, fused.head_size // 2
    block_half = power_of_two(half)
    block_heads = max(1, _NUMBERS // 4 // block_half)
    norms = _head_norms(fused)
    query_weight, key_weight = [norm.weight for norm in norms] or (None, None)
    with torch.cuda.device_of(rows):
        _code().rotate[(len(rows), -(-heads // block_heads))](
            rows=rows,
            row_stride=rows.stride(0),
            cosines=cosines[0].contiguous(),
            sines=sines[0].contiguous(),
            query_weight=query_weight,
            key_weight=key_weight,
            epsilon=norms[0].epsilon if norms else 0.0,
            QUERY_HEADS=fused.query_heads,
            HEADS=heads,
            HALF=half,
            BLOCK_H=block_heads,
            BLOCK_HALF=block_half,
            num_warps=1,
        )


def _gated(rows: torch.Tensor, activation: nn.Module) -> torch.Tensor:
    """``[T, 2 * N]``, gates before what they let through, to ``[T, N]``."""
    count, size = len(rows), rows.shape[1] // 2
    output = rows.new_empty(count, size)
    with torch.cuda.device_of(rows):
        _code().gate[(count, -(-size // _NUMBERS))](
            rows=rows,
            row_stride=rows.stride(0),
            output=output,
            SIZE=size,
            GELU=_ACTIVATIONS[type(activation).__name__],
            BLOCK=_NUMBERS,
            num_warps=4,
        )
    return output


def _head_norms(fused: FusedLayer) -> list[Norm]:
    return [cast(Norm, norm) for norm in fused.head_norms]


@cache
def _code() -> Any:
    """The programs; importing them needs Triton."""
    return import_module("server.models.gpu.layer_code")
