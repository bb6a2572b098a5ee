"""Replaces a model's linear layers by such with weights of 8 bits on a GPU, and tries them there."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from attention.kernels.triton_paged import Triton
from attention.patterns.full import Full
from server.models.fused import FusedLayer
from server.models.gpu.linear import EightBitLinear, Form

# Numbers of rows in each range that is computed in a way of its own, see ``EightBitLinear``.
_ROWS = (1, 17, 65, 257)

# Outputs that are compared at a time, since their weights in float32 take four times the memory.
_COMPARED_AT_ONCE = 8192

# What adding in another order changes, as a share of the sum of the products' sizes; one product of some
# thousands that is left out is more.
_TOLERANCE = 2.0**-15


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights of 8 bits can't be computed with on a device; ``None`` if they can.

    Args:
        device: which; the CPU can by Triton's interpreter, for tests.
        dtype: the model's number format.
    """
    # They ask of a machine what attention's programs ask of it.
    return next(iter(Triton().unsupported([], device, dtype, 1, Full())), None)


def replace_linears(linears: Iterable[tuple[nn.Module, str, nn.Linear]], form: Form) -> None:
    """Packs linear layers, one after the other, so that no more than one is there twice; then tries them.

    Trying compiles the programs, too, for every range of rows.

    Args:
        linears: each with the module that it belongs to, and its name there.
        form: of the weights.

    Raises:
        ValueError: weights can't be packed, or a product differs from that with the weights that the codes
            stand for by more than rounding, or can't be computed; the message says which.
    """
    distinct: dict[tuple[int, int, bool, torch.dtype], tuple[str, EightBitLinear]] = {}
    for parent, name, linear in linears:
        if isinstance(parent, FusedLayer):
            parent.plain = None  # its weights are views of those that go
        packed = EightBitLinear(linear, form)
        shape = packed.in_features, packed.out_features, packed.bias is not None, linear.weight.dtype
        distinct.setdefault(shape, (name, packed))
        setattr(parent, name, packed)
        del linear
    for (*_, dtype), (name, packed) in distinct.items():
        for rows in _ROWS:
            _try(name, packed, rows, dtype)


def _try(name: str, linear: EightBitLinear, rows: int, dtype: torch.dtype) -> None:
    place = linear.codes.device
    generator = torch.Generator().manual_seed(rows)
    random = partial(torch.randn, generator=generator)
    x = random(rows, linear.in_features).to(place, dtype)
    before = random(rows, linear.out_features).to(place, dtype)
    total = before.clone()
    of = f"{name} ({linear.in_features} to {linear.out_features}) of {rows} rows"
    try:
        with torch.inference_mode():
            found = linear(x)
            linear.add_to(total, x)
    except Exception as error:  # compilers and drivers fail in many ways
        reason = " ".join(str(error).split())
        raise ValueError(f"the product {of} fails: {type(error).__name__}: {reason}") from error
    wide = x.float()
    for begin in range(0, linear.out_features, _COMPARED_AT_ONCE):
        some = slice(begin, begin + _COMPARED_AT_ONCE)
        weight = linear.weight(begin, some.stop)
        expected, sizes = wide @ weight.t(), wide.abs() @ weight.abs().t()
        if linear.bias is not None:
            expected += linear.bias[some].float()
        for own, right in ((found, expected), (total, before[:, some].float() + expected)):
            allowed = _TOLERANCE * sizes + torch.finfo(dtype).eps * right.abs()
            if not bool(((own[:, some].float() - right).abs() <= allowed).all()):
                raise ValueError(f"the product {of} is not that with the weights that its codes stand for")
