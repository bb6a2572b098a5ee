"""The one interface between a step and a model: the runner and the start-up proofs call nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from attention.backends import Attention
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.rope import LengthRope
from attention.step import DeviceBatch, StepBatch
from attention.visible import Visible


def filled(tokens: int, page_size: int) -> int:
    """Tokens of a source with those that fill up its last page, so that its pages hold nothing else."""
    return -(-tokens // page_size) * page_size


class GivenUpError(Exception):
    """A step was given up halfway: something had come on its descriptor.

    Of its tokens, keys and values may have been written. They count as not computed, and the step that
    computes them overwrites these.
    """


@dataclass(slots=True, eq=False)
class PageTable:
    """A sequence's pages in order.

    Attributes:
        pages: page numbers; 0 where the pattern has evicted one.
        generation: another one whenever the sequence's pages are replaced, as when it is preempted or starts
            again, or cut. Within a generation pages are only appended or evicted.
        life: another one whenever one is replaced: within a life a token's page stays the same.
    """

    pages: list[int] = field(default_factory=list)
    generation: int = 0
    life: int = 0

    def replace(self, pages: list[int]) -> None:
        """Other pages, of another generation and another life."""
        self.pages = pages
        self.generation += 1
        self.life += 1

    def put(self, index: int, page: int) -> None:
        """Another page in the place of one, of another generation and another life."""
        self.pages[index] = page
        self.generation += 1
        self.life += 1

    def cut(self, kept: int) -> None:
        """Only the first pages, of another generation."""
        self.pages = self.pages[:kept]
        self.generation += 1


@dataclass(frozen=True)
class StepInput:
    """A step's input: ``T`` tokens of ``B`` sequences, flattened one sequence after the other.

    Attributes:
        ids: int64 ``[T]`` on the executor's device.
        computed: for each sequence, its tokens whose keys are in the cache already.
        counts: for each sequence, the tokens to compute now, at least one.
        prompt_lens: for each sequence, the tokens that were given to it.
        expected: for each sequence, its tokens so far, those being computed included; rotary frequencies
            that depend on lengths follow it.
        tables: for each sequence, its pages, enough for all of these tokens.
        page_size: tokens per page.
        rows: whose logits are wanted, in ascending or any other order; ``None`` for all ``T``.
        sources: of an encoder-decoder's sequences the token ids of each one's source, with which its prompt
            begins, ``filled``.
        watched: a descriptor; once it has something to read, the step is given up. Only for an executor that
            ``gives_up``.
    """

    ids: torch.Tensor
    computed: Sequence[int]
    counts: Sequence[int]
    prompt_lens: Sequence[int]
    expected: Sequence[int]
    tables: Sequence[PageTable]
    page_size: int
    rows: Sequence[int] | None = None
    sources: Sequence[Sequence[int]] = ()
    watched: int | None = None

    def __post_init__(self) -> None:
        # Native code takes the ids' number of rows and the counts' slots.
        if self.ids.shape[0] != sum(self.counts) or len(self.tables) != len(self.counts):
            raise ValueError("a step's ids, counts and page tables are of different tokens or sequences")

    @cached_property
    def visible(self) -> Visible:
        """The step as the host and the patterns see it; a captured step needs no more."""
        return Visible(StepBatch(self.computed, self.counts, self.page_size, self.prompt_lens))

    @cached_property
    def batch(self) -> AttentionBatch:
        """The same for attention, built at the first use."""
        pages = [table.pages for table in self.tables]
        return AttentionBatch(self.visible, DeviceBatch.of(self.visible.host, pages, self.ids.device))

    def take_batch(self, batch: AttentionBatch) -> None:
        """Takes a batch of just these tokens that is there already."""
        self.__dict__.update(batch=batch, visible=batch.visible)


class Executor(ABC):
    """A model over its paged cache, on one device. Which one runs is chosen once, at start.

    Attributes:
        name: in logs and ``GetModelInfo``.
        reason: why this executor, in words.
        model: that computes; its weights are what a step reads.
        device: where it computes.
        dtype: dtype of the computation.
        attention: pattern and kernel.
        cache: keys and values of all layers.
        rope: the model's rotary embeddings where their frequencies depend on lengths and the pattern lets
            distances grow; else ``None``.
        thread_invariant: to the last bit, results don't depend on the number of threads; torch's matrix
            products may cut their sums by these.
        gives_up: a step can be given up halfway, as ``StepInput.watched`` asks for.
    """

    name: str
    reason: str
    model: Any
    device: torch.device
    dtype: torch.dtype
    attention: Attention
    cache: PagedCache
    rope: LengthRope | None = None
    thread_invariant: bool = False
    gives_up: bool = False

    @abstractmethod
    def logits(self, step: StepInput) -> torch.Tensor:
        """Queues a forward; the step's keys and values are written to the cache.

        Returns:
            The logits ``[N, V]`` of ``step.rows``, good until the next call; of the first token where there
            are no such rows.

        Raises:
            GivenUpError: see ``StepInput.watched``.
        """

    def most_likely(self, step: StepInput) -> torch.Tensor | None:
        """The same, where of each row only its most likely token is wanted.

        Returns:
            The tokens with the largest logits, int64 ``[N]``, the first of equal ones; -1 where a logit is
            NaN or the largest is infinite. ``None``, and nothing is computed, where it is no faster than
            ``logits``.

        Raises:
            GivenUpError: see ``StepInput.watched``.
        """
        return None
