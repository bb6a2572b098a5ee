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
    """A rule over positions. A layer's own window applies as well, in the kernels.

    A rule is immutable and depends only on its arguments, so results are cached.

    Attributes:
        name: of the pattern in settings, logs and metrics.
        dense: every earlier token is visible and no page ever expires, so kernels may skip the rule.
        dense_layers: indices of layers that see every earlier token instead.
        rerotated: the number of first tokens whose keys are rerotated; see ``rerotation``.
        reach: the distance from every query to every key that it sees is less than this, for any context, so
            that the context may be longer than the model's own positions. ``None``: distances grow with the
            context.
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
            ValueError: an option is unknown or its value cannot be used; the message says what to give.
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
        """The same rule as ranges, for kernels that do not check every position.

        Args:
            positions: of queries, int64 ``[N]``.

        Returns:
            int64 ``[N, K, 2]``: ``K`` half-open ranges of key positions for each query, disjoint and in
            ascending order, except for empty ones, whose begin equals their end.
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
            int64 ``[N]``, at least 0, and never less for a later position; only called if ``rerotated`` is
            not 0.
        """
        raise NotImplementedError(f"{self.name} rerotates no keys")


class Causal(Pattern):
    """A pattern whose rule over positions is causality alone, so that no page expires."""

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.visible``."""
        return key_positions <= query_positions

    def spans(self, positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.spans``."""
        return torch.stack([torch.zeros_like(positions), positions + 1], dim=-1)[:, None]

    def expired(self, seq_len: int, page_size: int) -> range:
        """See ``Pattern.expired``; nothing ever expires."""
        return range(0)


class ContentPattern(Causal):
    """A pattern that selects by the content of queries and keys, for each KV head separately.

    Of the tokens that its rule over positions lets a query see it selects a part. The summary of each page's
    keys lies in ``LayerCache.summary``.

    Attributes:
        decoded_keys_differ: rows of the prompt see all, those after it a selection, so that in deeper layers
            the keys of an output token differ from those of the same token in a prompt.
        counted_ahead: a query reads exactly ``pages_selected`` pages, all whole except its own, or in a layer
            with a window the visible part of at most so many; kernels can plan for them before the selection.
            Else they count the selected tokens, for which the host waits.
        capturable: in a step that only the device knows (``Written.captured``, ``CapturedRows``), ``update``
            and ``select`` ask nothing of the host, and call the same operators for any numbers.
    """

    decoded_keys_differ: bool = False
    counted_ahead: bool = False
    capturable: bool = False

    def most_pages(self, page_size: int) -> int | None:
        """The most pages that a query that selects reads; ``None`` if there is no bound."""
        return None

    @abstractmethod
    def summary_of(
        self, layer: LayerSpec, page_size: int, dtype: torch.dtype
    ) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of one page summary, for a cache of keys in ``dtype``."""

    @abstractmethod
    def update(self, layer: LayerSpec, cache: LayerCache, written: Written) -> None:
        """Brings the page summaries up to date; called when the step's keys have just been written."""

    @abstractmethod
    def selects(self, positions: torch.Tensor, prompt_lens: torch.Tensor) -> torch.Tensor:
        """Which queries see only a selection: bool ``[N]``. The others see every earlier token.

        Args:
            positions: int64 ``[N]``.
            prompt_lens: int64 ``[N]``, the prompt length of each query's sequence.
        """

    def pages_selected(
        self, positions: torch.Tensor, prompt_lens: torch.Tensor, page_size: int
    ) -> torch.Tensor:
        """How many pages each query reads at most, int64 ``[N]``: by default all up to its own.

        Args:
            positions: int64 ``[N]``.
            prompt_lens: int64 ``[N]``, the prompt length of each query's sequence.
            page_size: tokens per page.
        """
        return positions // page_size + 1

    @abstractmethod
    def selection(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        page_size: int,
    ) -> torch.Tensor:
        """The tokens that each query that selects sees: the pattern's definition, from the keys themselves.

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
