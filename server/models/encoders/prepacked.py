"""Linear layers of float32 on a CPU whose weights oneDNN has laid out in advance.

torch computes a float32 linear layer with MKL, which on AMD processors does without AVX-512; oneDNN, which
torch brings too, is 2.1 times as fast there, and exact as well. torch offers it to its own compiler only, as
the operators that are called here. With AVX2 MKL is a little faster.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

log = logging.getLogger("longspan.models")

# The order of sums makes 1e-6.
_TOLERANCE = 1e-4


class PrepackedLinear(nn.Module):
    """``nn.Linear`` in float32.

    Args:
        linear: whose weights it has.

    Attributes:
        packed_bytes: bytes of the weights.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.packed_bytes = linear.weight.nbytes
        self.bias = linear.bias
        # Some models look at its dtype; the numbers are in the packed form only.
        self.weight = linear.weight.new_empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def prepack(model: nn.Module) -> str:
    """Replaces the linear layers of a float32 model on a CPU, each in its place; leaves those of others.

    Returns:
        The library that computes them now, as part of a sentence.
    """
    if any(weight.dtype != torch.float32 or weight.device.type != "cpu" for weight in model.parameters()):
        return "linear layers are torch's"
    reason = _obstacle()
    if reason is not None:
        return f"linear layers are torch's: {reason}"
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # A class derived from Linear computes something else.
            if type(child) is nn.Linear:
                setattr(parent, name, PrepackedLinear(child))
                count += 1
    return f"{count} linear layers are oneDNN's, with weights laid out in advance"


def _obstacle() -> str | None:
    """Why oneDNN is not used here; ``None`` if it is, and has been tried."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return "with AVX2 oneDNN was no faster"
    if not torch.backends.mkldnn.is_available():
        return "this torch comes without oneDNN"
    linear = nn.Linear(48, 64).requires_grad_(False)
    rows = torch.randn(5, 48)
    try:
        wrong = (PrepackedLinear(linear)(rows) - linear(rows)).abs().max()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"this torch's operators of oneDNN can't be called ({type(error).__name__})"
    return None if wrong < _TOLERANCE else f"oneDNN is off by {wrong:.1g} in a trial"
