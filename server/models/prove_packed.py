"""Proves packed layers strictly: on inputs that rounding leaves as they are, only the order of sums differs.

Activations are rounded to 8 bits by groups, each group by its own scale, before they are multiplied. Rows
whose numbers are whole multiples of a step, up to 127 steps in every group, lose nothing by that, so that the
operator has to give what float weights do. A row of zeros gives the biases alone.

Where rows of prompts are multiplied in bfloat16, each product is compared with weights so rounded, on rows
that bfloat16 holds exactly. What goes before and after a product is the same for both kinds of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from attention.forward import LayerCall
from attention.kernels.cpu import levels
from server.errors import RefusedError
from server.models.fused import FusedLayer, Norm
from server.models.quantized.layer import LINEARS, QuantizedLayer
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Given, Stage, run
from server.models.quantized.packing import COLUMNS, GROUP, Packed, unpack
from server.models.quantized.rotary import Angles
from server.models.quantized.stack import QuantizedStack

# Share of a row's largest number. Sums in another order make 1e-6; rounding to 8 bits would make 0.01.
_TOLERANCE = 2e-5
# Rows: of zeros, of sizes near a norm's epsilon, and of others far apart.
_SIZES = (0.0, 2e-3, 1.0, 30.0)
_ROWS = len(_SIZES)
# Panels of outputs whose weights are unpacked at once.
_PANELS = 256


def prove_linear(plain: torch.Tensor, bias: torch.Tensor | None, packed: QuantizedLinear) -> None:
    """Compares a packed linear layer with its weights in float.

    Args:
        plain: the weights ``[N, K]`` that were packed.
        bias: ``[N]``, or ``None``.
        packed: the layer.

    Raises:
        RefusedError: it computes something else.
    """
    x = _grid(packed.in_features)
    _compare("a linear layer", packed(x), _product(x, plain, bias, packed))


def prove_layer(fused: FusedLayer, packed: QuantizedLayer, angles: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compares each stage of a packed layer with the lean layer that it was made of.

    Args:
        fused: the layer with its float weights; left as it was found.
        packed: the same layer packed.
        angles: cosines and sines ``[T, D]`` of at least four positions.

    Raises:
        RefusedError: a stage computes something else; the sentence says which.
    """
    what = f"layer {packed.layer_idx}"
    cosines, sines = (part[-_ROWS:].contiguous() for part in angles)
    before, o, gate_up, down = packed.stages
    with torch.inference_mode(), _packed_weights(fused, packed):
        x = _before(fused.attention_norm)
        heads = torch.cat(fused.heads(x, cosines, sines), dim=1)
        found = _run(before, x, torch.empty_like(heads), Angles(cosines, sines, None))
        _compare(f"queries, keys and values of {what}", found, heads)

        x, residual = _grid(o.inputs), _grid(o.outputs, seed=1)
        _compare(f"the attention output of {what}", _run(o, x, residual.clone()), residual + fused.o(x))

        x = _before(fused.mlp_norm)
        expected = fused.gate_up(fused.mlp_norm(x))
        _compare(f"gate and up of {what}", _run(gate_up, x, torch.empty_like(expected)), expected)

        x = _gates(down.inputs)
        residual = _grid(down.outputs, seed=1)
        _compare(f"the MLP output of {what}", _run(down, x, residual.clone()), residual + fused.gated(x))
        for part in packed.linears:
            assert isinstance(part, QuantizedLinear)
            _prove_prompts(what, part)


def prove_head(norm: Norm, plain: nn.Linear, packed: QuantizedLinear) -> None:
    """Compares the packed output layer, after the model's last norm, with the float one.

    Raises:
        RefusedError: it computes something else.
    """
    x = _before(norm)
    expected = _product(norm(x), plain.weight, plain.bias, packed)
    stage = packed.stage(norm=norm.weight.data_ptr(), epsilon=norm.epsilon)
    _compare("the output layer", _run(stage, x, torch.empty_like(expected)), expected)


def prove_stack(stack: QuantizedStack, hidden: torch.Tensor, angles: Angles) -> None:
    """Compares all layers in turn with their stages one by one, to the last bit.

    Args:
        stack: the layers, each of which is proven.
        hidden: float32 ``[T, C]``.
        angles: of the rows.

    Raises:
        RefusedError: the two differ.
    """
    _prove_stack(stack, hidden, angles, None)
    if levels.has_matrix_unit():
        _prove_stack(stack, hidden, angles, np.arange(len(hidden)) % 2 == 0)


def _prove_stack(stack: QuantizedStack, hidden: torch.Tensor, angles: Angles, given: Given) -> None:
    rows, attend = hidden.clone(), _Elementwise()
    for layer in stack.layers:
        assert isinstance(layer, QuantizedLayer)
        before, o, gate_up, down = layer.stages
        query_heads, kv_heads, size = layer.heads
        heads = rows.new_empty(len(rows), query_heads + 2 * kv_heads, size)
        _run(before, rows, heads, angles, given)
        split = heads.split([query_heads, kv_heads, kv_heads], dim=1)
        query, key, value = (part.transpose(0, 1)[None] for part in split)
        attended = attend.attend(LayerCall(layer, query, key, value, None, layer.features))[0]
        _run(o, attended, rows, given=given)
        between = _run(gate_up, rows, rows.new_empty(len(rows), layer.between), given=given)
        _run(down, between, rows, given=given)
    if not torch.equal(stack.run(hidden.clone(), angles, given, attend), rows):
        raise _refusal("all layers in turn", "than each by itself")


class _Elementwise:
    """Stands in for attention, so that sums in another order, which torch may take, make no difference."""

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``; each token sees itself."""
        _, query, key, value, *_ = call
        shared = query.shape[1] // key.shape[1]
        keys, values = (part.repeat_interleave(shared, dim=1) for part in (key, value))
        return (query * keys + values).transpose(1, 2).contiguous()


def _grid(size: int, *, seed: int = 0) -> torch.Tensor:
    """Rows of whole multiples of a step, which differs from group to group and from row to row."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-size // GROUP)
    codes = torch.randint(-126, 127, (_ROWS, groups, GROUP), generator=generator).float()
    codes[:, :, 0] = 127
    steps = 2.0 ** torch.randint(-3, 3, (_ROWS, groups, 1), generator=generator) / 127
    # Those far above their neighbors are multiplied as they are, and leave the others their own scale.
    codes[:, ::5, 1] = 1000.3
    return (codes * steps * torch.tensor(_SIZES)[:, None, None]).flatten(1)[:, :size].contiguous()


def _before(norm: Norm) -> torch.Tensor:
    """Rows that are such a grid after a norm, but for one factor per row."""
    weight = norm.weight
    grid = _grid(len(weight))
    enough = weight.abs() > 0.01 * weight.abs().median()
    return (grid / weight).where(enough, 0).contiguous()


def _gates(size: int) -> torch.Tensor:
    """Rows of gates and ups whose products are such a grid."""
    gates = torch.randn(_ROWS, size, generator=torch.Generator().manual_seed(2))
    gates = gates.sign() * (0.3 + gates.abs())
    return torch.cat([gates, _grid(size) / nn.functional.silu(gates)], dim=1)


def _product(
    x: torch.Tensor, plain: torch.Tensor, bias: torch.Tensor | None, packed: QuantizedLinear
) -> torch.Tensor:
    """Rows times weights, which are unpacked a part at a time, since an output layer has many."""
    if packed.exact:
        return linear(x, plain, bias)
    panels = zip(packed.codes.split(_PANELS), packed.scales.split(_PANELS), strict=True)
    parts = [
        x @ unpack(Packed(packed.bits, *part, packed.exact), COLUMNS * len(part[0]), packed.in_features).T
        for part in panels
    ]
    product = torch.cat(parts, dim=1)[:, : packed.out_features]
    return product if bias is None else product + bias


def _weights(plain: torch.Tensor, packed: QuantizedLinear) -> torch.Tensor:
    """The weights that codes stand for; exact ones are proven to be the very weights."""
    return plain if packed.exact else packed.weight


@contextmanager
def _packed_weights(fused: FusedLayer, packed: QuantizedLayer) -> Iterator[None]:
    """Lets a lean layer compute with the weights that the codes of the packed one stand for."""
    kept = [(name, getattr(fused, name).weight) for name in LINEARS]
    try:
        for (name, weight), part in zip(kept, packed.linears, strict=True):
            assert isinstance(part, QuantizedLinear)
            getattr(fused, name).weight = nn.Parameter(_weights(weight, part), requires_grad=False)
        yield
    finally:
        for name, weight in kept:
            getattr(fused, name).weight = weight


def _prove_prompts(what: str, packed: QuantizedLinear) -> None:
    """Compares the product of rows of prompts with weights in bfloat16."""
    if not levels.has_matrix_unit():
        return
    x = to_bfloat16(_grid(packed.in_features))
    found = x.new_empty(len(x), packed.out_features)
    _run(packed.stage(), x, found, given=np.ones(len(x), dtype=bool))
    _compare(f"a product of prompts of {what}", found, linear(x, to_bfloat16(packed.weight), packed.bias))


def to_bfloat16(weights: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of bfloat16, as float32; of two equally near, the one that is further from 0."""
    bits = weights.contiguous().view(torch.int32) + 0x8000
    return (bits & -0x10000).view(torch.float32)


def _run(
    stage: Stage, x: torch.Tensor, output: torch.Tensor, angles: Angles | None = None, given: Given = None
) -> torch.Tensor:
    own = (Stage * 1)(Stage.from_buffer_copy(stage))
    own[0].input, own[0].output = x.data_ptr(), output.data_ptr()
    if angles is not None:
        own[0].cosines, own[0].sines = angles.cosines.data_ptr(), angles.sines.data_ptr()
        own[0].positions = None if angles.positions is None else angles.positions.data_ptr()
    run(own, len(x), given)
    return output


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Each row, or each head of it, by its own largest number; NaN differs."""
    error = (found - expected).abs().amax(-1)
    if not bool((error <= _TOLERANCE * expected.abs().amax(-1)).all()):
        far = float((error / expected.abs().amax(-1)).nan_to_num(nan=float("inf")).max())
        raise _refusal(what, f"than their weights do: by up to {far:.2g} of the largest number")


def _refusal(what: str, otherwise: str) -> RefusedError:
    return RefusedError(
        f"with packed weights, {what} computes something else {otherwise}; choose --weights float"
    )
