"""Linear layers of float32 in C++, with GELU or residual and LayerNorm; see float_linear.cpp."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from attention.kernels.cpu import native

SOURCE = Path(__file__).with_suffix(".cpp")


class FloatLinear(ctypes.Structure):
    """``FloatLinear`` in float_linear.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "weights", "bias", "added", "scale", "shift")),
        *((name, ctypes.c_void_p) for name in ("output", "parallel")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "gelu", "threads")),
        ("epsilon", ctypes.c_double),
    ]


class Compiled(NamedTuple):
    """The operator, and the threads that it runs on.

    Attributes:
        run: takes the address of a ``FloatLinear``.
        panel: outputs whose weights lie side by side.
        team: the address of GOMP_parallel in the OpenMP runtime of torch itself, so that there is one pool.
    """

    run: Any
    panel: int
    team: int


@functools.cache
def compiled() -> Compiled:
    """The operator, compiled if it is not there yet.

    Raises:
        NativeError: it cannot be compiled; the message says why, as part of a sentence.
    """
    library = native.load(SOURCE, native.kept(), (FloatLinear,))
    library.longspan_float_linear.restype = None
    library.longspan_panel.restype = ctypes.c_int64
    return Compiled(library.longspan_float_linear, library.longspan_panel(), *native.openmp("GOMP_parallel"))


class NativeLinear(nn.Module):
    """``nn.Linear`` in float32 on a CPU. A row's result does not depend on the others.

    Args:
        linear: whose weights it has.

    Attributes:
        packed_bytes: bytes of the weights.
        gelu: whether GELU by the error function follows.

    Raises:
        NativeError: as in ``compiled``.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.gelu = False
        self._compiled = compiled()
        panel, weight = self._compiled.panel, linear.weight.detach()
        more = -self.out_features % panel
        padded = nn.functional.pad(weight, (0, 0, 0, more)).unflatten(0, (-1, panel))
        self._packed = padded.transpose(1, 2).contiguous()
        self._bias = weight.new_zeros(self.out_features + more)
        self.bias = linear.bias
        if linear.bias is not None:
            self._bias[: self.out_features] = linear.bias.detach()
        self.packed_bytes = linear.weight.nbytes
        # Some models look at its dtype; the numbers are in the packed form only.
        self.weight = linear.weight.new_empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        return self.run(x)

    def run(
        self, x: torch.Tensor, added: torch.Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> torch.Tensor:
        """``norm(linear(x) + added)``.

        Args:
            x: ``[..., inputs]``.
            added: ``[..., outputs]``, if anything is.
            norm: of the outputs, with scale and shift, if there is one.

        Raises:
            TypeError: the numbers are not float32 on a CPU, whose memory would be read as such.
            ValueError: the shapes do not fit.
        """
        x, added = x.contiguous(), None if added is None else added.contiguous()
        output = x.new_empty(*x.shape[:-1], self.out_features)
        for each in (x, output if added is None else added):
            if each.dtype != torch.float32 or each.device.type != "cpu":
                raise TypeError(f"a linear layer of float32 on the CPU got {each.dtype} on {each.device}")
        if x.shape[-1] != self.in_features or (added is not None and added.shape != output.shape):
            raise ValueError(
                f"a linear layer of {self.in_features} inputs and {self.out_features} outputs got "
                f"{list(x.shape)}{'' if added is None else f' and {list(added.shape)}'}"
            )
        call = FloatLinear(
            *(x.data_ptr(), self._packed.data_ptr(), self._bias.data_ptr()),
            None if added is None else added.data_ptr(),
            *((None, None) if norm is None else (norm.weight.data_ptr(), norm.bias.data_ptr())),
            *(output.data_ptr(), self._compiled.team, output.numel() // self.out_features),
            *(self.in_features, self.out_features, self.gelu, torch.get_num_threads()),
            0.0 if norm is None else norm.eps,
        )
        self._compiled.run(ctypes.byref(call))
        return output


class NormedSum(nn.Module):
    """The LayerNorm of the sum of a linear layer and the rows that went around it.

    Args:
        linear: the layer.
        norm: with scale and shift, over its outputs.
    """

    def __init__(self, linear: NativeLinear, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.linear, self.norm = linear, norm

    def forward(self, x: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` and ``[..., outputs]`` to ``[..., outputs]``."""
        return self.linear.run(x, around, self.norm)
