"""The data that patterns, kernels and models exchange. Nothing here computes attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from attention.formats import cast, put
from attention.transfer import DeviceOnlyError, to_device


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer of a model asks for, as read from its first call.

    Attributes:
        index: position of the layer in the model, from 0.
        query_heads: number of query heads.
        kv_heads: number of key and value heads; divides ``query_heads``.
        head_size: size of a head of queries or keys.
        value_size: size of a value head.
        scale: factor on the logits before softmax.
        window: the model's own sliding window: key ``j`` is visible to query ``i`` only if
            ``i - j < window``. ``None`` means no window.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before masking. ``None`` means off.
        sinks: the layer has learned sink logits (one per query head), which join the softmax's
            denominator and contribute no value.
    """

    index: int
    query_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass(slots=True)
class AttentionBatch:
    """One step's work, flattened: ``T`` query tokens of ``B`` sequences, one after the other.

    Built once per step and shared by all layers. Sequence ``b`` owns the query rows
    ``query_starts[b]:query_starts[b + 1]``; they are its *last* tokens, so query row ``r`` has position
    ``seq_lens[b] - query_lens[b] + r - query_starts[b]``.

    Attributes:
        query_starts: host integers, ``B + 1`` of them.
        seq_lens: host integers, ``B``: tokens of each sequence with keys in the cache once this step's
            keys are written, the queries' own included.
        prompt_lens: host integers, ``B``: tokens of each sequence that were given to it; what comes after
            them it wrote itself. May be more than ``seq_lens``.
        page_table: int32 ``[B, P]`` on the device: page ``page_table[b, t // page_size]`` holds token
            ``t`` at offset ``t % page_size``. Entries past the sequence's end, and entries of pages that
            the pattern has let go, hold 0, the page that is never written.
        slots: int64 ``[T]`` on the device: where each query token's own key and value go, as
            ``page * page_size + offset``.
        positions: int64 ``[T]`` on the device: each query token's position in its sequence.
        page_size: tokens per page.
        plans: what kernels prepared for this batch, by a key of their own; filled as layers run.
        device_only: decodes whose lengths the device alone knows, see ``AttentionBatch.on_device``.
    """

    query_starts: list[int]
    seq_lens: list[int]
    prompt_lens: list[int]
    page_table: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    page_size: int
    plans: dict[Any, Any] = field(default_factory=dict)
    device_only: bool = False

    @classmethod
    def build(
        cls,
        computed: Sequence[int],
        counts: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
        *,
        prompt_lens: Sequence[int] | None = None,
    ) -> AttentionBatch:
        """The batch in which each sequence's next tokens are computed.

        Args:
            computed: for each sequence, its tokens whose keys are in the cache already.
            counts: for each sequence, the tokens to compute now, at least one.
            pages: for each sequence, its pages in order, enough for all of these tokens.
            page_size: tokens per page.
            device: where the tensors go.
            prompt_lens: for each sequence, the tokens that were given to it; ``None`` for all so far.
        """
        device = torch.device(device)
        table = np.zeros((len(pages), max(map(len, pages))), dtype=np.int32)
        for row, owned in zip(table, pages, strict=True):
            row[: len(owned)] = owned
        seq_lens = [have + add for have, add in zip(computed, counts, strict=True)]
        if max(counts) == 1:
            # Decodes. This is done for every token, and between two steps' weights each function of numpy or
            # torch that was not called yet is found in memory, not in a cache: numbers of Python are faster.
            starts, owners, positions = range(len(pages) + 1), np.arange(len(pages)), np.array(computed)
            slots = np.array(
                [
                    owned[have // page_size] * page_size + have % page_size
                    for have, owned in zip(computed, pages, strict=True)
                ]
            )
        else:
            have, add = np.array(computed, dtype=np.int64), np.array(counts, dtype=np.int64)
            edges = np.concatenate([[0], np.cumsum(add)])
            owners = np.repeat(np.arange(len(pages)), add)
            positions = np.arange(edges[-1]) - edges[owners] + have[owners]
            slots = table[owners, positions // page_size] * np.int64(page_size) + positions % page_size
            starts = edges.tolist()
        return cls(
            query_starts=list(starts),
            seq_lens=seq_lens,
            prompt_lens=list(seq_lens if prompt_lens is None else prompt_lens),
            page_table=to_device(torch.from_numpy(table), device),
            slots=to_device(torch.from_numpy(slots), device),
            positions=to_device(torch.from_numpy(positions), device),
            page_size=page_size,
            plans={"host owners": torch.from_numpy(owners)},
        )

    @classmethod
    def on_device(
        cls, owners: torch.Tensor, positions: torch.Tensor, page_table: torch.Tensor, page_size: int
    ) -> AttentionBatch:
        """Decodes of one token each, of which the host knows nothing but their number.

        What is computed from it takes the same operators on the same memory whatever the numbers are, so
        that it can be captured once and replayed with others. ``seq_lens`` and ``prompt_lens`` are empty,
        and what is ``host_...`` can't be had.

        Args:
            owners: int64 ``[T]`` on the device: each token's row of the page table. May be longer than the
                table is; tokens of the same row at the same position must be the same.
            positions: int64 ``[T]`` on the device.
            page_table: int32 ``[R, P]`` on the device.
            page_size: tokens per page.
        """
        pages = page_table[owners, positions // page_size].long()
        return cls(
            query_starts=list(range(len(owners) + 1)),
            seq_lens=[],
            prompt_lens=[],
            page_table=page_table,
            slots=pages * page_size + positions % page_size,
            positions=positions,
            page_size=page_size,
            plans={"owners": owners},
            device_only=True,
        )

    @classmethod
    def counted(cls, computed: Sequence[int], page_size: int, prompt_lens: Sequence[int]) -> AttentionBatch:
        """What the host alone wants to know of decodes, one token each: no pages, nothing on a device.

        Args:
            computed: for each sequence, its tokens whose keys are in the cache already.
            page_size: tokens per page.
            prompt_lens: for each sequence, the tokens that were given to it.
        """
        positions = np.array(computed, dtype=np.int64)
        return cls(
            query_starts=list(range(len(positions) + 1)),
            seq_lens=(positions + 1).tolist(),
            prompt_lens=list(prompt_lens),
            page_table=torch.zeros(len(positions), 0, dtype=torch.int32),
            slots=torch.zeros(0, dtype=torch.int64),
            positions=torch.from_numpy(positions),
            page_size=page_size,
            plans={"host owners": torch.from_numpy(np.arange(len(positions)))},
        )

    @property
    def size(self) -> int:
        """Number of sequences."""
        return len(self.query_starts) - 1

    @property
    def decode_only(self) -> bool:
        """Every sequence has a single query token."""
        return self.query_starts == list(range(self.size + 1))

    def query_len(self, b: int) -> int:
        """Number of query tokens of sequence ``b``."""
        return self.query_starts[b + 1] - self.query_starts[b]

    @property
    def owners(self) -> torch.Tensor:
        """Each query row's sequence, int64 ``[T]`` on the device."""
        rows: torch.Tensor = self.plan("owners", lambda: to_device(self.host_owners, self.slots.device))
        return rows

    @property
    def host_owners(self) -> torch.Tensor:
        """The same on the host, which no device is asked for."""
        rows: torch.Tensor = self.plan("host owners", self._host_owners)
        return rows

    @property
    def host_positions(self) -> torch.Tensor:
        """``positions`` on the host, which no device is asked for."""
        rows: torch.Tensor = self.plan("host positions", self._host_positions)
        return rows

    @property
    def host_prompt_lens(self) -> torch.Tensor:
        """The prompt length of each query row's sequence, int64 ``[T]`` on the host."""
        rows: torch.Tensor = self.plan("host prompt lens", self._host_prompt_lens)
        return rows

    # Arrays, since with so few numbers a call of torch's costs more than what it computes.

    def _host_prompt_lens(self) -> torch.Tensor:
        self._refuse_if_device_only()
        lens = np.array(self.prompt_lens)
        return torch.from_numpy(lens if self.decode_only else lens[self.host_owners.numpy()])

    def _host_owners(self) -> torch.Tensor:
        self._refuse_if_device_only()
        return torch.from_numpy(np.repeat(np.arange(self.size), np.diff(self.query_starts)))

    def _host_positions(self) -> torch.Tensor:
        self._refuse_if_device_only()
        if self.positions.device.type == "cpu":
            return self.positions
        first = np.subtract(self.seq_lens, self.query_starts[1:])
        rows = np.arange(self.query_starts[-1])
        return torch.from_numpy(rows + first[self.host_owners.numpy()])

    def _refuse_if_device_only(self) -> None:
        if self.device_only:
            raise DeviceOnlyError("lengths and positions of a captured step are known to the device alone")

    def plan(self, key: Any, build: Callable[[], Any]) -> Any:
        """What ``build`` makes, made once per batch and key: layers that agree share it."""
        if key not in self.plans:
            self.plans[key] = build()
        return self.plans[key]


class LayerCache(NamedTuple):
    """One layer's part of the paged KV cache.

    Attributes:
        keys: ``[pages, page_size, kv_heads, head_size]``, after RoPE.
        values: ``[pages, page_size, kv_heads, value_size]``.
        summary: ``[pages, ...]``, what a ``ContentPattern`` remembers of each page's keys, or ``None``.

    Page 0 is never allocated and never written; a page table that points there says "no page".
    """

    keys: torch.Tensor
    values: torch.Tensor
    summary: torch.Tensor | None = None

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores ``key`` ``[T, kv_heads, head_size]`` and ``value``, ``cast``, at ``slots`` ``[T]``."""
        for pages, numbers in ((self.keys, key), (self.values, value)):
            put(pages.view(-1, *pages.shape[2:]), slots, cast(numbers, pages.dtype))
