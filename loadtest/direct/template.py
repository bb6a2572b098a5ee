"""Pages that a model computed for a short prompt, to be copied into sequences that are only placed."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items

import torch

from attention.dtypes import put, taken
from server.engine.core import EngineCore
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence
from server.messages import Submit

_Parts = list[torch.Tensor | None]

# How long a copied page's keys are at least, as a share of what they were.
_SHORTEST = 0.9


class Template:
    """Copies of whole pages: keys, values, and what a pattern remembers of them.

    Args:
        core: an engine with room for the prompt.
        request: its prompt makes the pages; all of its tokens are computed, and its pages then given back.
    """

    @torch.inference_mode()
    def __init__(self, core: EngineCore, request: Submit) -> None:
        self._cache = core.runner.cache
        self._device = core.runner.device
        self._layers: dict[int, _Parts] = {}
        sequence = Sequence(request, arrival=0)
        try:
            while sequence.remaining:
                count = min(sequence.remaining, core.scheduler.max_batch_tokens)
                if not core.kv.extend(sequence, count):
                    raise RuntimeError("pages are short although there was room")
                core.runner.run([Scheduled(sequence, count)])
                sequence.computed += count  # not KVManager.advance: no page is freed before it is copied
            pages = torch.tensor(sequence.pages, device=self._device)
            for index, layer in self._cache.layers.items():
                self._layers[index] = [None if tensor is None else tensor[pages] for tensor in layer]
        finally:
            core.kv.release(sequence)
        self._pages = len(pages)

    @torch.inference_mode()
    def fill(self, pages: Items[int], rng: random.Random) -> None:
        """Gives every page of a sequence the content of one of these.

        The first page gets that of the first, since keys and values at a sequence's begin are unlike all
        others. The other pages come in random order, so that a selection by content finds no regularity, and
        their keys slightly scaled down, so that it finds no equal pages: no two pages of a text are.

        Args:
            pages: of the sequence, in order; 0 where the pattern has evicted one.
            rng: draws which.
        """
        copied = [(page, rng.randrange(self._pages) if at else 0) for at, page in enumerate(pages) if page]
        if not copied:
            return
        places, sources = torch.tensor(copied, device=self._device).unbind(dim=1)
        lengths = torch.tensor([rng.uniform(_SHORTEST, 1) for _ in copied], device=self._device)
        for index, layer in self._cache.layers.items():
            keys, values, summary = self._layers[index]
            assert keys is not None
            assert values is not None
            put(layer.keys, places, _shortened(taken(keys, sources), lengths))
            put(layer.values, places, taken(values, sources))
            if layer.summary is not None and summary is not None:
                found = taken(summary, sources)
                # Float summaries scale with the keys; buckets and the like depend only on direction.
                put(
                    layer.summary,
                    places,
                    _shortened(found, lengths) if summary.is_floating_point() else found,
                )


def _shortened(numbers: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Each of ``[N, ...]`` times one of ``lengths`` ``[N]``; the order of sizes stays."""
    return (numbers.float() * lengths.view(-1, *[1] * (numbers.ndim - 1))).to(numbers.dtype)
