"""A linear layer with weights of 8 bits on a GPU; activations stay as they are."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from attention.kernels.triton_device import LARGE_SHARED_MEMORY, Device, device_of

Form = Literal["int8", "fp8"]

GROUP = 128
"""Neighboring inputs of an output that share a scale."""

# The code of a group's largest weight.
_MOST = {"int8": 127.0, "fp8": 448.0}
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# Rows of codes begin where wide loads may.
_ALIGNMENT = 16

# Outputs that are packed at a time, since their numbers in float32 take four times the memory.
_PACKED_AT_ONCE = 8192

# Rows up to which products are those of few.
_FEW = 16
# The ends of the ranges beyond them.
_RANGES = (64, 256, None)

# Outputs of a program that puts parts together.
_COMBINED = 1024

# Compute capability of the first GPUs that convert float8_e4m3.
_CONVERTS_FROM = (8, 9)
# Major compute capability of those whose registers hold large tiles, since tensor cores read one side of a
# product from shared memory.
_LARGE_TILES = (9, 10)


class Tiles(NamedTuple):
    """How a product is cut.

    Attributes:
        rows: of a tile.
        outputs: of a tile.
        slices: groups of inputs at a time, for few rows; else 0.
        split: parts of the inputs that programs of their own multiply.
        warps: of a program.
        stages: of its pipeline.
    """

    rows: int
    outputs: int
    slices: int
    split: int
    warps: int
    stages: int


class EightBitLinear(nn.Module):
    """Weights in codes of 8 bits, with a scale for each output and ``GROUP`` neighboring inputs.

    Codes are whole numbers (``int8``) or numbers of float8_e4m3 (``fp8``), scales are bfloat16. Products are
    summed in float32, and rounded once. A row's result does not depend on the other rows. It depends on how
    many there are only by the range that their number is in: 1 to 16, 17 to 64, 65 to 256, more. Within a
    range it is the same to the last bit.

    Args:
        linear: with weights ``[N, K]``, and a bias ``[N]`` or none, in float32, bfloat16 or float16.
        form: of the codes.

    Raises:
        ValueError: weights are no numbers.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, form: Form) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = linear.in_features, linear.out_features, form
        codes, scales = pack(linear.weight, form)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def weight(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """The weights of the outputs ``[begin, end)`` that codes and scales stand for, float32, made anew."""
        codes = self.codes[begin:end, : self.in_features].view(_CODES[self.form]).float()
        scales = self.scales[:, begin:end].float().repeat_interleave(GROUP, dim=0)
        return codes * scales[: self.in_features].t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` to ``[..., N]``, in the number format of ``x``."""
        rows = x.reshape(-1, self.in_features)
        output = rows.new_empty(len(rows), self.out_features)
        self._multiply(rows, output, None)
        return output.view(*x.shape[:-1], self.out_features)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the product with ``x`` ``[T, K]`` to ``total`` ``[T, N]``, in place, with one rounding."""
        assert total.stride(1) == 1
        self._multiply(x, total, total)

    def _multiply(self, x: torch.Tensor, output: torch.Tensor, total: torch.Tensor | None) -> None:
        count = len(x)
        if not count:
            return
        if x.stride(1) != 1:
            x = x.contiguous()
        device = device_of(x.device)
        tiles = tiles_for(count, self.in_features, self.out_features, x.dtype, device)
        shared: dict[str, Any] = {
            "output": output,
            "total": total,
            "total_stride": output.stride(0),
            "bias": self.bias,
            "rows": count,
            "outputs": self.out_features,
        }
        product: dict[str, Any] = {
            **shared,
            "x": x,
            "x_stride": x.stride(0),
            "codes": self.codes,
            "code_stride": self.codes.stride(0),
            "scales": self.scales,
            "inputs": self.in_features,
            "CONVERTS": device.capability >= _CONVERTS_FROM,
            "EVEN": self.in_features % (GROUP * max(1, tiles.slices)) == 0,
            "GROUP": GROUP,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.outputs,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }
        columns = -(-self.out_features // tiles.outputs)
        with torch.cuda.device_of(x):
            if tiles.slices:
                _code().multiply_few[(columns,)](**product, SLICES=tiles.slices)
                return
            partial = None
            if tiles.split > 1:
                partial = x.new_empty(tiles.split, count, self.out_features, dtype=torch.float32)
            grid = -(-count // tiles.rows) * columns, tiles.split
            _code().multiply_many[grid](**product, partial=partial, SPLIT=tiles.split)
            if partial is not None:
                _code().combine[(count, -(-self.out_features // _COMBINED))](
                    **shared, partial=partial, SPLIT=tiles.split, BLOCK=_COMBINED, num_warps=4
                )


def pack(weight: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes for scales that reach each group's extremes.

    A weight is off by at most half of its scale (``int8``), or by a sixteenth of itself and, near zero, by
    2^-10 of its scale (``fp8``).

    Args:
        weight: ``[N, K]``, floats.
        form: of the codes.

    Returns:
        Codes ``[N, K filled up]``, bytes or int8, and scales ``[K / GROUP, N]`` bfloat16.

    Raises:
        ValueError: weights are no numbers.
    """
    outputs, inputs = weight.shape
    groups = -(-inputs // GROUP)
    stored = torch.int8 if form == "int8" else torch.uint8
    codes = weight.new_zeros(outputs, -(-inputs // _ALIGNMENT) * _ALIGNMENT, dtype=stored)
    scales = weight.new_empty(groups, outputs, dtype=torch.bfloat16)
    most = _MOST[form]
    for begin in range(0, outputs, _PACKED_AT_ONCE):
        some = slice(begin, begin + _PACKED_AT_ONCE)
        own = weight[some].detach().float()
        parts = nn.functional.pad(own, (0, groups * GROUP - inputs)).view(len(own), groups, GROUP)
        scale = (parts.abs().amax(-1) / most).bfloat16()
        if not bool(scale.isfinite().all()):
            raise ValueError("weights are no numbers, or too large")
        step = scale.float().where(scale > 0, 1.0)[..., None]
        exact = (parts / step).clamp(-most, most).flatten(1)[:, :inputs]
        rounded = exact.round() if form == "int8" else exact
        codes[some, :inputs] = rounded.to(_CODES[form]).view(stored)
        scales[:, some] = scale.t()
    return codes, scales


@cache
def tiles_for(count: int, inputs: int, outputs: int, dtype: torch.dtype, device: Device) -> Tiles:
    """How a product is cut; for numbers of rows in one range (see ``EightBitLinear``) the same.

    Args:
        count: number of rows.
        inputs: of each.
        outputs: of each.
        dtype: their number format.
        device: what it is for.
    """
    narrow = dtype != torch.float32
    large = device.shared_memory >= LARGE_SHARED_MEMORY
    if count <= _FEW:
        if not narrow:
            return Tiles(_FEW, 32, 2, 1, 4, 2)
        # A multiprocessor takes two programs of the smaller kind.
        if large and -(-outputs // 32) <= device.processors:
            return Tiles(_FEW, 32, 8, 1, 8, 3)
        return Tiles(_FEW, 32, 4, 1, 4, 4)
    most = next(most for most in _RANGES if most is None or count <= most)
    rows = 128 if narrow and most != 64 and device.capability[0] in _LARGE_TILES else 64
    columns = 128 if narrow else 64
    split = 1
    if most is not None:
        # Parts enough to fill the device, of four groups at least.
        tiles = most // rows * -(-outputs // columns)
        programs = device.processors * (2 if large and rows == 64 else 1)
        split = max(1, min(programs // tiles, -(-inputs // GROUP) // 4))
    return Tiles(rows, columns, 0, split, 8, 3 if narrow else 2)


@cache
def _code() -> Any:
    """The programs; importing them needs Triton."""
    return import_module("server.models.gpu.linear_code")
