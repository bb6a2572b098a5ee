"""Pages that a model made of a short prompt, to be copied into sequences that nobody computed."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items

import torch

from server.engine.core import EngineCore
from server.engine.scheduler import Work
from server.engine.sequence import Sequence
from server.engine.types import Submit

_Parts = list[torch.Tensor | None]


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
                core.runner.run([Work(sequence, count)])
                sequence.computed += count  # not KVManager.advance: no page is let go before it is copied
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
        others. The other pages come in any order, lest a choice by content find them in regular places.

        Args:
            pages: of the sequence, in order; 0 where the pattern has let one go.
            rng: chooses.
        """
        copied = [(page, rng.randrange(self._pages) if at else 0) for at, page in enumerate(pages) if page]
        if not copied:
            return
        places, sources = torch.tensor(copied, device=self._device).unbind(dim=1)
        for index, layer in self._cache.layers.items():
            for tensor, source in zip(layer, self._layers[index], strict=True):
                if tensor is not None and source is not None:
                    tensor[places] = source[sources]
