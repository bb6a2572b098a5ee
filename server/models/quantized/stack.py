"""All decoder layers of few bits as one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from attention.batch import AttentionBatch
from attention.forward import Attend
from attention.hook import Step
from attention.kernels.cpu.chain import Chain, Program, table
from server.models.quantized.layer import QuantizedLayer
from server.models.quantized.native import Stage, chained
from server.models.quantized.rotary import Angles
from server.models.quantized.workspace import Workspace

# Of a layer: queries, keys and values; attention's output; gate and up; down.
_STAGES = 4


class QuantizedStack(nn.Module):
    """What its layers compute one after another.

    Where a step's attention is a ``Program``, there is one native call for everything; else the layers
    are called.

    Args:
        layers: which ``fit`` together and share a workspace.

    Attributes:
        layers: the same.
    """

    def __init__(self, layers: Sequence[QuantizedLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._workspace: Workspace = layers[0].workspace
        self._heads = query_heads, kv_heads, size = layers[0].heads
        self._widest = max((query_heads + 2 * kv_heads) * size, *(layer.between for layer in layers))
        self._stages = table(Stage, _STAGES * len(layers))
        for i, layer in enumerate(layers):
            for k, stage in enumerate(layer.stages):
                self._stages[_STAGES * i + k] = np.frombuffer(bytes(stage), self._stages.dtype)[0]
        # What follows a layer's attention and what precedes the next one's go in one call.
        counts = [1, *[_STAGES] * (len(layers) - 1), _STAGES - 1]
        self._runs, self._calls = chained(self._stages, counts)
        self._placed: tuple[int, ...] = ()
        self._program: Program | None = None
        self._chain: Chain | None = None

    @staticmethod
    def fits(layers: Sequence[nn.Module]) -> bool:
        """They are quantized layers of one shape."""
        quantized = [layer for layer in layers if isinstance(layer, QuantizedLayer)]
        return len(quantized) == len(layers) and len({layer.heads for layer in quantized}) == 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        longspan: Attend | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """See ``FusedLayer.forward``."""
        assert position_embeddings is not None
        cosines, sines = (angles[0].contiguous() for angles in position_embeddings)
        angles = Angles(cosines, sines, None)
        return self.run(hidden_states[0], angles, longspan, attention_mask, **more)[None]

    def run(
        self,
        hidden: torch.Tensor,
        angles: Angles,
        longspan: Attend | None,
        attention_mask: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """What the layers make of rows ``[T, C]``, which are overwritten."""
        if not isinstance(longspan, Step) or longspan.program is None or attention_mask is not None:
            states, embeddings = hidden[None], angles.by_token()
            for layer in self.layers:
                states = layer(
                    states,
                    attention_mask=attention_mask,
                    position_embeddings=embeddings,
                    longspan=longspan,
                    **more,
                )
            return states[0]
        assert hidden.is_contiguous()
        assert isinstance(longspan.batch, AttentionBatch)  # programs are the CPU's, where no step is captured
        rows = len(hidden)
        between = self._workspace.rows(rows, self._widest)
        heads = self._workspace.heads(rows, *self._heads)
        attended = self._workspace.attended(rows, self._heads[0], self._heads[2])
        places = hidden, heads.rows, attended, between, angles.cosines, angles.sines
        self._place(*(tensor.data_ptr() for tensor in places))
        positions = angles.positions
        self._stages["positions"][::_STAGES] = 0 if positions is None else positions.data_ptr()
        self._runs["rows"], self._runs["threads"] = rows, torch.get_num_threads()
        longspan.program.prepare(longspan.batch, heads.queries, heads.keys, heads.values, attended)
        self._chained(longspan.program).run()
        return hidden

    def _place(self, *places: int) -> None:
        """Says where rows lie; from step to step they mostly stay."""
        if places == self._placed:
            return
        self._placed = places
        hidden, heads, attended, between, cosines, sines = places
        before, o, gate_up, down = (self._stages[k::_STAGES] for k in range(_STAGES))
        before["input"] = o["output"] = gate_up["input"] = down["output"] = hidden
        before["output"], o["input"] = heads, attended
        gate_up["output"] = down["input"] = between
        before["cosines"], before["sines"] = cosines, sines

    def _chained(self, program: Program) -> Chain:
        if self._chain is None or self._program is not program:
            calls = [self._calls[0]]
            for layer, after in zip(self.layers, self._calls[1:], strict=True):
                assert isinstance(layer, QuantizedLayer)
                calls += [*program.calls[layer.layer_idx], after]
            self._program, self._chain = program, Chain(calls)
        return self._chain
