"""Calls of attention layers in a real forward: queries, and the keys and values before them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from attention.kernels.base import locate
from attention.kernels.sdpa import Sdpa
from attention.types import LayerSpec
from tests.engine.harness import greedy_requests, make_core, run


class Asked(NamedTuple):
    """One layer's call.

    Attributes:
        layer: the layer.
        query: ``[R, H, D]``, after RoPE.
        positions: int64 ``[R]``.
        keys: ``[L, Hkv, D]``, from position 0 on.
        values: ``[L, Hkv, Dv]``.
    """

    layer: LayerSpec
    query: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class Recorded(Sdpa):
    """The kernel, which keeps the calls of the last step's layers. For one sequence at a time."""

    def __init__(self):
        self.asked = {}

    def forward(self, layer, query, cache, plan, sinks, rerotated=None):
        batch = plan.batch.device
        slots, _ = locate(batch, 0, torch.arange(plan.batch.host.seq_lens[0]))
        keys, values = (pages.flatten(0, 1)[slots] for pages in (cache.keys, cache.values))
        self.asked[layer.index] = Asked(layer, query.clone(), batch.positions, keys, values)
        return super().forward(layer, query, cache, plan, sinks, rerotated)


def last_step(loaded, tokens, rows):
    """Each layer's call when the last tokens of a prompt are computed, under full attention.

    Args:
        loaded: the model.
        tokens: of the prompt.
        rows: how many are computed at once.
    """
    core = make_core(loaded, pages=len(tokens) // 16 + 3, max_batch_tokens=rows, kernel="sdpa")
    kernel = Recorded()
    core.runner.executor.attention = replace(core.runner.attention, kernel=kernel)
    run(core, greedy_requests([tokens], 1))
    return kernel.asked
