"""An encoder-decoder over its paged cache: sources are encoded, the decoder's tokens computed by steps.

A sequence's prompt is its source, filled up to the end of a page, and then what the decoder begins with. So
the pages of a source hold nothing else, and equal sources share them. A source is encoded in the step that
computes the last of its tokens, as its tokens see all others; in steps before, they only take their part of
the budget.
"""

from __future__ import annotations

import torch

from attention.backends import Attention
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.encoder_decoder import DecoderStep, SourceWriter
from attention.transfer import to_device
from server.models.executors.base import Executor, StepInput, filled
from server.models.halves import Halves
from server.models.loaded import LoadedModel


class EncoderDecoderExecutor(Executor):
    """See ``Executor``.

    Args:
        loaded: the model, with its halves.
        attention: pattern and kernel; the pattern sees all tokens.
        cache: keys and values of all layers.
        reason: why this executor.
    """

    name = "encoder_decoder"

    def __init__(self, loaded: LoadedModel, attention: Attention, cache: PagedCache, reason: str) -> None:
        assert loaded.halves is not None
        self.model, self.attention, self.cache, self.reason = loaded.model, attention, cache, reason
        self.device, self.dtype = loaded.model.device, loaded.dtype
        self._halves: Halves = loaded.halves

    def logits(self, step: StepInput) -> torch.Tensor:
        """See ``Executor.logits``."""
        self._encode(step)
        decoder = _DecoderTokens(step)
        if not decoder.sequences:
            return torch.empty(0, 0, device=self.device)
        batch = AttentionBatch.build(
            decoder.computed,
            decoder.counts,
            decoder.pages,
            step.page_size,
            self.device,
        )
        sources = [len(step.sources[b]) for b in decoder.sequences]
        pages = [
            step.tables[b].pages[: filled(len(step.sources[b]), step.page_size) // step.page_size]
            for b in decoder.sequences
        ]
        attend = DecoderStep(self.attention, self.cache, self._halves.roles, batch, sources, pages)
        flat, rows = (to_device(torch.tensor(found), self.device) for found in (decoder.flat, decoder.rows))
        return self._halves.decode(step.ids[flat], batch.device.positions, rows, attend)

    def _encode(self, step: StepInput) -> None:
        """Writes the keys and values of the sources that this step completes."""
        due = [
            b
            for b, (source, done, count) in enumerate(
                zip(step.sources, step.computed, step.counts, strict=True)
            )
            if done < filled(len(source), step.page_size) <= done + count
        ]
        if not due:
            return
        due.sort(key=lambda b: len(step.sources[b]))
        sources = [step.sources[b] for b in due]
        slots = [
            step.tables[b].pages[place // step.page_size] * step.page_size + place % step.page_size
            for b, source in zip(due, sources, strict=True)
            for place in range(len(source))
        ]
        written = to_device(torch.tensor(slots), self.device)
        writer = SourceWriter(self.attention, self.cache, self._halves.roles, written)
        self._halves.write(self._halves.encode(sources), writer)


class _DecoderTokens:
    """The decoder's part of a step, whose sequences count from what the decoder begins with.

    Attributes:
        sequences: those of the step that have some.
        computed: as of ``StepInput``.
        counts: as of ``StepInput``.
        pages: of each, from that of the decoder's first token on.
        flat: index in the step of each token.
        rows: index among these tokens of each whose logits are wanted; of the first where there are none.
    """

    def __init__(self, step: StepInput) -> None:
        self.sequences: list[int] = []
        self.computed: list[int] = []
        self.counts: list[int] = []
        self.pages: list[list[int]] = []
        self.flat: list[int] = []
        start = 0
        for b, (done, count) in enumerate(zip(step.computed, step.counts, strict=True)):
            first = filled(len(step.sources[b]), step.page_size)
            begin = max(done, first)
            if begin < done + count:
                self.sequences.append(b)
                self.computed.append(begin - first)
                self.counts.append(done + count - begin)
                self.pages.append(step.tables[b].pages[first // step.page_size :])
                self.flat += range(start + begin - done, start + count)
            start += count
        index = {place: row for row, place in enumerate(self.flat)}
        self.rows = list(range(len(self.flat))) if step.rows is None else [index[r] for r in step.rows] or [0]
