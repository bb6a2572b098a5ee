"""A decoder layer of the common shape, as one lean module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm

from attention.backends import UnsupportedError
from attention.forward import Attend, LayerCall

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}


class NotCommonError(Exception):
    """A layer is of another shape; the message says where it differs."""


class Norm(nn.Module):
    """RMSNorm over the last dimension.

    Args:
        plain: a norm of a model's own. That it computes the same, ``server.models.recognize_layers`` proves.

    Raises:
        NotCommonError: it lacks weights or epsilon.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        epsilon = getattr(plain, "variance_epsilon", getattr(plain, "eps", None))
        weight = getattr(plain, "weight", None)
        if not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float):
            raise NotCommonError(f"{type(plain).__name__} is no RMSNorm")
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., N]`` to the same shape."""
        return rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class FusedLayer(nn.Module):
    """RMSNorm, attention, RMSNorm, gated MLP; each of the two parts is added to what came in, in place.

    The weights of queries, keys and values are one matrix, those of gate and up projection another.

    Args:
        plain: a decoder layer of transformers. Its own weights become views of the merged ones, so that the
            two together take no more memory than one.

    Attributes:
        layer_idx: the layer's index, for attention.
        features: further arguments of attention, as the plain layer's call gave them; see ``Attend``.
        head_norms: of queries and of keys, or none.

    Raises:
        NotCommonError: the layer does not have the parts. Having them does not prove that it computes the
            same: ``server.models.recognize_layers`` does.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        parts: dict[str, Any] = dict(plain.named_children())
        if parts.keys() != _PARTS:
            raise NotCommonError(f"its parts are {', '.join(sorted(parts))}")
        attention, mlp = parts["self_attn"], parts["mlp"]
        _check_linears(attention, _ATTENTION, _HEAD_NORMS)
        _check_linears(mlp, _MLP, {"act_fn"})
        self.layer_idx: int = attention.layer_idx
        self.head_size: int = attention.head_dim
        self.features: dict[str, Any] = {}
        self.attention_norm = Norm(parts["input_layernorm"])
        self.mlp_norm = Norm(parts["post_attention_layernorm"])
        self.head_norms = nn.ModuleList(
            Norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)
        )
        self.query_heads = attention.q_proj.out_features // self.head_size
        self.kv_heads = attention.k_proj.out_features // self.head_size
        self.qkv = _merge([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o: nn.Module = attention.o_proj
        self.gate_up = _merge([mlp.gate_proj, mlp.up_proj])
        self.down: nn.Module = mlp.down_proj
        self.activation: nn.Module = mlp.act_fn

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        longspan: Attend | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """The layer's output ``[1, T, C]``, which takes the place of ``hidden_states``.

        Args:
            hidden_states: ``[1, T, C]``.
            attention_mask: what the model prepared, if it did.
            position_embeddings: cosines and sines ``[1, T, D]`` of the rotary angles.
            longspan: what computes attention.
            more: arguments that only other forms of layers use.

        Raises:
            UnsupportedError: ``longspan`` is not there.
        """
        if longspan is None:
            raise UnsupportedError("a lean layer computes with the keyword argument longspan only")
        assert position_embeddings is not None
        hidden = hidden_states[0]
        heads = self.heads(hidden, *(part[0] for part in position_embeddings))
        queries, keys, values = (part.transpose(0, 1)[None] for part in heads)
        attended = longspan.attend(LayerCall(self, queries, keys, values, attention_mask, self.features))
        hidden += self.o(attended.reshape(len(hidden), -1))
        hidden += self.gated(self.gate_up(self.mlp_norm(hidden)))
        return hidden_states

    def heads(
        self, hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values ``[T, H, D]`` of rows ``[T, C]`` at rotary angles ``[T, D]``."""
        heads = self.qkv(self.attention_norm(hidden)).view(len(hidden), -1, self.head_size)
        rotated, values = heads.split([self.query_heads + self.kv_heads, self.kv_heads], dim=1)
        sizes = [self.query_heads, self.kv_heads]
        if self.head_norms:
            parts = zip(self.head_norms, rotated.split(sizes, dim=1), strict=True)
            rotated = torch.cat([norm(part) for norm, part in parts], dim=1)
        queries, keys = _rotate(rotated, cosines[:, None], sines[:, None]).split(sizes, dim=1)
        return queries, keys, values

    def gated(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """The MLP's output ``[T, C]`` from the outputs ``[T, 2 * F]`` of its first layer."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        down: torch.Tensor = self.down(self.activation(gate) * up)
        return down


def _check_linears(module: nn.Module, linears: set[str], others: set[str]) -> None:
    children = dict(module.named_children())
    if not linears <= children.keys() <= linears | others:
        raise NotCommonError(f"{type(module).__name__} has {', '.join(sorted(children))}")
    for name in linears:
        # A class derived from Linear computes something else: low-rank additions, blocks of few bits.
        if type(children[name]) is not nn.Linear:
            raise NotCommonError(f"{name} is a {type(children[name]).__name__}")
    if len(_HEAD_NORMS & children.keys()) == 1:
        raise NotCommonError(f"{type(module).__name__} has one of {' and '.join(sorted(_HEAD_NORMS))}")


def _merge(linears: Sequence[nn.Linear]) -> nn.Module:
    """One layer whose outputs are those of all, one after another; theirs become views of its weights."""
    sizes = [linear.out_features for linear in linears]
    merged = nn.Linear(linears[0].in_features, sum(sizes), bias=False, device="meta")
    weights: list[torch.Tensor] = [linear.weight for linear in linears]
    merged.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    for linear, part in zip(linears, merged.weight.split(sizes), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    if any(linear.bias is not None for linear in linears):
        biases: list[torch.Tensor] = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
            for linear in linears
        ]
        merged.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return merged


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of halves: ``[T, H, D]`` with ``[T, 1, D]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines
