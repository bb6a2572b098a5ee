"""Which cached tokens a query may see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch

from attention.patterns.blocks import SelectingRows
from attention.patterns.written import Written
from attention.types import LayerCache, LayerSpec


class Pattern(ABC):
    """A rule over positions. What a layer adds of its own (its window) comes on top, in the kernels.

    A rule knows nothing but what it is asked with, and stays as it is: answers are kept and looked up.

    Attributes:
        name: what the pattern is called in settings, logs and metrics.
        dense: every earlier token is visible and no page ever expires, so kernels may skip the rule.
        dense_layers: indices of layers that the pattern leaves alone; these see every earlier token.
        rerotated: the number of first tokens whose keys are rerotated; see ``rerotation``.
        reach: no query meets a key from a distance of so many positions or more, whatever the context, so
            that it may be longer than the model's own positions. ``None``: distances grow with the context.
    """

    name: str
    dense: bool = False
    dense_layers: tuple[int, ...] = ()
    rerotated: int = 0
    reach: int | None = None

    @classmethod
    @abstractmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """The pattern as the operator set it.

        Raises:
            ValueError: an option is unknown or its value cannot be used; the sentence says which to give.
        """

    @property
    @abstractmethod
    def options(self) -> dict[str, str]:
        """The options in force, defaults included, in the form that ``from_options`` takes."""

    @abstractmethod
    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Whether the query at a position may see the key at another: the pattern's definition.

        Args:
            query_positions: integers of any shape.
            key_positions: integers of a shape that broadcasts with it.

        Returns:
            Booleans of the broadcast shape. Never true for a later key, always true for a query's own.
        """

    @abstractmethod
    def spans(self, positions: torch.Tensor) -> torch.Tensor:
        """The same rule as ranges, for kernels that must not look at every position.

        Args:
            positions: of queries, int64 ``[N]``.

        Returns:
            int64 ``[N, K, 2]``: ``K`` half-open ranges of key positions for each query, disjoint and in
            ascending order but for empty ones, whose begin equals their end.
        """

    @abstractmethod
    def expired(self, seq_len: int, page_size: int) -> range:
        """Page indices of a sequence that no query at position ``seq_len`` or later can see.

        Once expired, a page stays expired. The KV manager frees these pages and puts 0 in the page table.
        """

    def rerotation(self, positions: torch.Tensor) -> torch.Tensor:
        """By how many positions the first ``rerotated`` keys are rerotated: so much nearer a query sees them.

        Args:
            positions: of queries, int64 ``[N]``.

        Returns:
            int64 ``[N]``, at least 0, and never less for a later position; only asked where ``rerotated`` is
            not 0.
        """
        raise NotImplementedError(f"{self.name} rerotates no keys")


class ContentPattern(Pattern):
    """A pattern that chooses by what queries and keys are, for each KV head by itself.

    Its rule over positions is plain causality (``visible``, ``spans``): what may be chosen at best. No page
    expires. What it remembers of each page's keys, its page summary, lies in ``LayerCache.summary``.

    Attributes:
        decoded_keys_differ: rows below ``prompt_lens`` see all, those after it choose, so that the deeper
            layers' keys of an output token are not those of the same token in a prompt.
        counted_ahead: what a query reads are exactly ``pages_chosen`` pages, whole but for its own, or in a
            layer with a window what it sees of at most so many; kernels can prepare for them before the
            choice is made. Else they count what was chosen, for which the host waits.
        capturable: of a step that the device alone knows (``Written.captured``, ``CapturedRows``), ``update``
            and ``select`` ask nothing of the host and call the same operators whatever its numbers are.
    """

    decoded_keys_differ: bool = False
    counted_ahead: bool = False
    capturable: bool = False

    def most_pages(self, page_size: int) -> int | None:
        """Pages that a query that chooses reads, at most; ``None`` where there is no bound."""
        return None

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.visible``: what may be chosen at best."""
        return key_positions <= query_positions

    def spans(self, positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.spans``: what may be chosen at best."""
        return torch.stack([torch.zeros_like(positions), positions + 1], dim=-1)[:, None]

    def expired(self, seq_len: int, page_size: int) -> range:
        """See ``Pattern.expired``; nothing ever expires."""
        return range(0)

    @abstractmethod
    def summary_of(
        self, layer: LayerSpec, page_size: int, dtype: torch.dtype
    ) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of one page summary, for a cache of keys in ``dtype``."""

    @abstractmethod
    def update(self, layer: LayerSpec, cache: LayerCache, written: Written) -> None:
        """Brings the page summaries up to date; called when the step's keys have just been written."""

    @abstractmethod
    def chooses(self, positions: torch.Tensor, prompt_lens: torch.Tensor) -> torch.Tensor:
        """Which queries see a choice only: bool ``[N]``. The others see every earlier token.

        Args:
            positions: int64 ``[N]``.
            prompt_lens: int64 ``[N]``, the prompt length of each query's sequence.
        """

    def pages_chosen(
        self, positions: torch.Tensor, prompt_lens: torch.Tensor, page_size: int
    ) -> torch.Tensor:
        """How many pages each query reads at most, int64 ``[N]``: all before it, unless a class knows better.

        Args:
            positions: int64 ``[N]``.
            prompt_lens: int64 ``[N]``, the prompt length of each query's sequence.
            page_size: tokens per page.
        """
        return positions // page_size + 1

    @abstractmethod
    def chosen(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        page_size: int,
    ) -> torch.Tensor:
        """What each query that chooses sees: the pattern's definition, from the keys themselves.

        Args:
            layer: the layer.
            query: ``[R, H, D]`` of one sequence, after RoPE.
            positions: int64 ``[R]``.
            keys: ``[L, Hkv, D]``, all of the sequence up to its last query, from position 0 on.
            page_size: tokens per page.

        Returns:
            bool ``[R, Hkv, L]``. Never true for a later key, always true for a query's own.
        """

    @abstractmethod
    def select(
        self, layer: LayerSpec, query: torch.Tensor, rows: SelectingRows, cache: LayerCache
    ) -> torch.Tensor:
        """The same selection as ranges, from the page summaries.

        Args:
            layer: the layer.
            query: ``[N, H, D]``, after RoPE: the rows ``rows`` of the batch's queries.
            rows: query rows of the step.
            cache: the layer's keys, values and page summaries.

        Returns:
            int64 ``[N, Hkv, K, 2]``, ranges as in ``Pattern.spans``.
        """
