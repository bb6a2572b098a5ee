"""All decoder layers of few bits as native calls over shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from attention.forward import Attend, LayerCall
from attention.kernels.cpu.chain import Chain, NativeCall, Placed, same, table
from attention.kernels.cpu.chained import ChainedAttention
from server.models.quantized.layer import QuantizedLayer
from server.models.quantized.native import Given, Stage, chained
from server.models.quantized.rotary import Angles
from server.models.quantized.workspace import Heads, Workspace

# Of a layer: queries, keys and values; attention's output; gate and up; down.
_STAGES = 4


class QuantizedStack(nn.Module):
    """The layers' stages, one after another.

    Between two layers' attention there is one native call. ``run`` makes these calls one by one; ``chain``
    links them with the calls of ``ChainedAttention``, so that a step is a single call.

    Args:
        layers: with heads of one shape, and one workspace.

    Attributes:
        layers: the same.
    """

    def __init__(self, layers: Sequence[QuantizedLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._in_order = list(layers)
        self._workspace: Workspace = layers[0].workspace
        self._heads = query_heads, kv_heads, size = layers[0].heads
        self._widest = max((query_heads + 2 * kv_heads) * size, *(layer.between for layer in layers))
        self._stages = table(Stage, _STAGES * len(layers))
        for i, layer in enumerate(layers):
            for k, stage in enumerate(layer.stages):
                self._stages[_STAGES * i + k] = np.frombuffer(bytes(stage), self._stages.dtype)[0]
        # The stages between two layers' attention go in one call.
        counts = [1, *[_STAGES] * (len(layers) - 1), _STAGES - 1]
        self._runs, self._calls = chained(self._stages, counts)
        self._apart = [Chain([call]) for call in self._calls]
        self._placed: Placed = ((), 0)

    def run(self, hidden: torch.Tensor, angles: Angles, given: Given, attend: Attend) -> torch.Tensor:
        """The layers' output for rows ``[T, C]``, which are overwritten; calls ``attend`` layer by layer.

        Args:
            hidden: float32, contiguous.
            angles: rotary angles of the rows.
            given: as ``place`` takes it.
            attend: computes attention.
        """
        heads, attended = self.place(hidden, angles, given)
        first, *others = self._apart
        first.run()
        query, key, value = (part.transpose(0, 1)[None] for part in heads[1:])
        for layer, after in zip(self._in_order, others, strict=True):
            call = LayerCall(layer, query, key, value, None, layer.features)
            attended.copy_(attend.attend(call)[0])
            after.run()
        return hidden

    def place(self, hidden: torch.Tensor, angles: Angles, given: Given) -> tuple[Heads, torch.Tensor]:
        """Sets where the next run's rows lie; from step to step they mostly stay.

        Args:
            hidden: float32 ``[T, C]``, contiguous; overwritten by the run.
            angles: rotary angles of the rows.
            given: which rows belong to a prompt, bool ``[T]``; ``None``: none does. At levels of native code
                with a matrix unit these are multiplied in bfloat16. The caller keeps it alive until the run.

        Returns:
            Where the run puts queries, keys and values of each layer, and where it reads the output of its
            attention, float32 ``[T, H, D]``.
        """
        assert hidden.is_contiguous()
        rows = len(hidden)
        between = self._workspace.rows(rows, self._widest)
        heads = self._workspace.heads(rows, *self._heads)
        attended = self._workspace.attended(rows, self._heads[0], self._heads[2])
        placed = (hidden, heads.rows, attended, between, *angles, given), torch.get_num_threads()
        if not same(placed, self._placed):
            self._placed = placed
            *tensors, positions, _ = placed[0]
            places = [tensor.data_ptr() for tensor in tensors]
            before, o, gate_up, down = (self._stages[k::_STAGES] for k in range(_STAGES))
            before["input"] = o["output"] = gate_up["input"] = down["output"] = places[0]
            before["output"], o["input"] = places[1:3]
            gate_up["output"] = down["input"] = places[3]
            before["cosines"], before["sines"] = places[4:]
            before["positions"] = 0 if positions is None else positions.data_ptr()
            self._runs["rows"], self._runs["threads"] = rows, placed[1]
            self._runs["given"] = 0 if given is None else given.ctypes.data
        return heads, attended

    def chain(self, attention: ChainedAttention, *after: NativeCall) -> Chain:
        """All layers and their attention as one call; ``place`` and ``attention.prepare`` say where.

        Args:
            attention: of the layers.
            after: calls after all of these.
        """
        calls = [self._calls[0]]
        for layer, run in zip(self._in_order, self._calls[1:], strict=True):
            calls += [*attention.calls[layer.layer_idx], run]
        return Chain([*calls, *after])
