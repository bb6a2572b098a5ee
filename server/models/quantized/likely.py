"""The output layer as a native call that finds each row's most likely token, without its logits."""

from __future__ import annotations

import numpy as np
import torch

from attention.kernels.cpu.chain import table
from server.models.fused import Norm
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Stage, chained


class LikelyTokens:
    """See ``likely.hpp``.

    Args:
        head: the output layer.
        norm: before it.

    Attributes:
        call: for a chain; ``place`` says where its rows and tokens lie.
    """

    def __init__(self, head: QuantizedLinear, norm: Norm) -> None:
        stage = head.stage(norm=norm.weight.data_ptr(), epsilon=norm.epsilon)
        self._parts = head, norm  # the stage points to them
        self._stages = table(Stage, 1)
        self._stages[0] = np.frombuffer(bytes(stage), self._stages.dtype)[0]
        self._runs, (self.call,) = chained(self._stages, [1])

    def place(self, hidden: torch.Tensor) -> torch.Tensor:
        """Sets the rows of the next call, float32 ``[T, C]``, contiguous.

        Returns:
            Where it puts the tokens with the largest logits, the first of equal ones, int64 ``[T]``; -1
            where a logit is NaN or the largest is infinite.
        """
        tokens = torch.empty(len(hidden), dtype=torch.int64)
        self._stages["input"], self._stages["likely"] = hidden.data_ptr(), tokens.data_ptr()
        self._runs["rows"], self._runs["threads"] = len(hidden), torch.get_num_threads()
        return tokens
