"""A linear layer of few bits on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from server.models.quantized.native import Stage, run
from server.models.quantized.packing import Packed, unpack


class QuantizedLinear(nn.Module):
    """Packed weights times activations that are rounded to 8 bits by groups of 32.

    A row's result does not depend on the other rows.

    Args:
        packed: the weights.
        inputs: size of a row before.
        outputs: size of a row after.
        bias: ``[outputs]``, or ``None``.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, packed: Packed, inputs: int, outputs: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = inputs, outputs, packed.bits
        self.exact = packed.exact
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("bias", None if bias is None else bias.detach().float().contiguous())

    @property
    def weight(self) -> torch.Tensor:
        """``[outputs, inputs]`` float32, made anew."""
        packed = Packed(self.bits, self.codes, self.scales, self.exact)
        return unpack(packed, self.out_features, self.in_features)

    def stage(self, **more: float | None) -> Stage:
        """A stage of this layer, with these fields besides; where rows lie is for the caller to set.

        It is good for as long as the layer lives.
        """
        own: dict[str, float | None] = {
            "codes": self.codes.data_ptr(),
            "scales": self.scales.data_ptr(),
            "bias": None if self.bias is None else self.bias.data_ptr(),
            "inputs": self.in_features,
            "outputs": self.out_features,
            "input_stride": self.in_features,
            "output_stride": self.out_features,
            "bits": self.bits,
        }
        return Stage(**own | more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` to ``[..., outputs]``, in the dtype of ``x``."""
        rows = x.reshape(-1, self.in_features).float().contiguous()
        output = rows.new_empty(len(rows), self.out_features)
        run((Stage * 1)(self.stage(input=rows.data_ptr(), output=output.data_ptr())), len(rows))
        return output.to(x.dtype).view(*x.shape[:-1], self.out_features)
