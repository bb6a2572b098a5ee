"""Batches over a poisoned cache with shuffled pages, and attention computed by its definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from attention import AttentionBatch, LayerCache, LayerSpec, PagedCache
from attention.kernels.base import Kernel, Kind
from attention.patterns import blocks
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.bigbird import BigBird
from attention.patterns.blocks import KnownRows
from attention.patterns.full import Full
from attention.patterns.longformer import Longformer
from attention.patterns.lsh import Lsh
from attention.patterns.oracle import Oracle
from attention.patterns.segment import Segment
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from attention.patterns.written import Written
from attention.step import StepBatch
from attention.visible import Visible


@dataclass
class Case:
    layer: LayerSpec
    cache: LayerCache
    batch: AttentionBatch
    query: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    sinks: torch.Tensor | None

    def only(self, b: int) -> Case:
        """The same sequence without its neighbors."""
        host = self.batch.host
        start, stop = host.query_starts[b], host.query_starts[b + 1]
        table = self.batch.device.page_table
        batch = AttentionBatch.build(
            [host.seq_lens[b] - host.query_len(b)],
            [host.query_len(b)],
            table[b : b + 1].tolist(),
            host.page_size,
            table.device,
            prompt_lens=[host.prompt_lens[b]],
        )
        return Case(
            self.layer,
            self.cache,
            batch,
            self.query[start:stop],
            [self.keys[b]],
            [self.values[b]],
            self.sinks,
        )


def make_case(
    layer: LayerSpec,
    sequences: list[tuple[int, int]],
    page_size: int,
    *,
    pattern: Pattern | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    prompt_lens: list[int] | None = None,
) -> Case:
    """``sequences`` are (length, query tokens). Only tokens on pages that have not expired are written.

    Where ``dtype`` has 8 bits, in which no model computes, queries and sinks are in float32. A content
    pattern's summaries are updated twice, as in serving: before the queries' own keys are written,
    and after. ``prompt_lens`` are the lengths if not given.
    """
    pattern = pattern or Full()
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype).to(device)

    counts = [-(-length // page_size) for length, _ in sequences]
    whole = PagedCache([layer], sum(counts) + 1, page_size, dtype, device, pattern=pattern, poison=True)
    cache = whole.layers[layer.index]
    free = (torch.randperm(sum(counts), generator=random) + 1).tolist()
    table = torch.zeros(len(sequences), max(counts), dtype=torch.int32)
    keys, values = [], []
    for b, (length, queries) in enumerate(sequences):
        table[b, : counts[b]] = torch.tensor([free.pop() for _ in range(counts[b])], dtype=torch.int32)
        at = torch.arange(length)
        where = table[b, at // page_size].long() * page_size + at % page_size
        gone = pattern.expired(length - queries, page_size)
        kept = ~torch.isin(at // page_size, torch.tensor(list(gone), dtype=torch.long)) & (
            at < length - queries
        )
        key, value = (
            normal(length, layer.kv_heads, layer.head_size),
            normal(length, layer.kv_heads, layer.value_size),
        )
        cache.write(where[kept].to(device), key[kept], value[kept])
        table[b, list(gone)] = 0
        keys.append(key)
        values.append(value)
    batch = AttentionBatch.build(
        [length - queries for length, queries in sequences],
        [queries for _, queries in sequences],
        table.tolist(),
        page_size,
        device,
        prompt_lens=prompt_lens,
    )
    if isinstance(pattern, ContentPattern):
        done = {b: length - queries for b, (length, queries) in enumerate(sequences) if length > queries}
        if done:
            pages = [table[b].tolist() for b in done]
            earlier = AttentionBatch.build([0] * len(done), list(done.values()), pages, page_size, device)
            update(pattern, layer, cache, earlier)
    own = [slice(length - queries, length) for length, queries in sequences]
    cache.write(
        batch.device.slots,
        torch.cat([key[part] for key, part in zip(keys, own, strict=True)]),
        torch.cat([value[part] for value, part in zip(values, own, strict=True)]),
    )
    if isinstance(pattern, ContentPattern):
        update(pattern, layer, cache, batch)
    query = normal(len(batch.host.positions), layer.query_heads, layer.head_size)
    sinks = normal(layer.query_heads) if layer.sinks else None
    if dtype.itemsize == 1:
        query, sinks = query.float(), None if sinks is None else sinks.float()
    return Case(layer, cache, batch, query, keys, values, sinks)


def with_prompts(batch: AttentionBatch, prompt_lens: list[int]) -> AttentionBatch:
    """The same step of sequences with other prompts."""
    host = batch.host
    counts = [host.query_len(b) for b in range(host.size)]
    computed = [length - count for length, count in zip(host.seq_lens, counts, strict=True)]
    known = StepBatch(computed, counts, host.page_size, prompt_lens)
    return AttentionBatch(Visible(known), batch.device)


def attend(
    kernel: Kernel[Any],
    layer: LayerSpec,
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    pattern: Pattern,
    sinks: torch.Tensor | None,
    rerotated: torch.Tensor | None = None,
) -> torch.Tensor:
    """``Kernel.forward`` with a plan of its own."""
    plan = kernel.plan(Kind.of(layer, pattern, query, cache), batch)
    return kernel.forward(layer, query, cache, plan, sinks, rerotated)


def update(pattern: ContentPattern, layer: LayerSpec, cache: LayerCache, batch: AttentionBatch) -> None:
    """The pattern's summaries, when the keys of ``batch`` have been written."""
    pattern.update(layer, cache, Written.known(batch.host, batch.device))


def known(batch: AttentionBatch, rows: Sequence[int] | torch.Tensor) -> KnownRows:
    """Some rows of the step, as patterns are given those that select."""
    return KnownRows(batch.host, batch.device, np.asarray(rows, dtype=np.int64))


def by_definition(case: Case, pattern: Pattern) -> torch.Tensor:
    """One query, one head at a time, in double precision."""
    layer, batch = case.layer, case.batch.host
    output = torch.empty(len(case.query), layer.query_heads, layer.value_size, dtype=torch.float64)
    for b in range(batch.size):
        for row in range(batch.query_starts[b], batch.query_starts[b + 1]):
            i = batch.seq_lens[b] - batch.query_starts[b + 1] + row
            visible = torch.tensor(
                [
                    pattern.visible(torch.tensor(i), torch.tensor(j)).item()
                    and (layer.window is None or i - j < layer.window)
                    for j in range(i + 1)
                ]
            ).expand(layer.kv_heads, -1)
            if isinstance(pattern, ContentPattern):
                visible = visible & _selection(case, pattern, b, row, i)
            for head in range(layer.query_heads):
                kv = head // (layer.query_heads // layer.kv_heads)
                seen = visible[kv].nonzero().flatten()
                logits = case.keys[b][seen, kv].double() @ case.query[row, head].double() * layer.scale
                if layer.softcap is not None:
                    logits = layer.softcap * torch.tanh(logits / layer.softcap)
                weights = logits.exp()
                total = weights.sum()
                if case.sinks is not None:
                    total = total + math.exp(float(case.sinks[head]))
                output[row, head] = weights / total @ case.values[b][seen, kv].double()
    return output


def _selection(case: Case, pattern: ContentPattern, b: int, row: int, i: int) -> torch.Tensor:
    """The tokens that the query at position ``i`` of sequence ``b`` sees, bool ``[Hkv, i + 1]``."""
    at = torch.tensor([i])
    if not pattern.selects(at, torch.tensor([case.batch.host.prompt_lens[b]])):
        return torch.ones(case.layer.kv_heads, i + 1, dtype=torch.bool)
    query, keys = case.query[row : row + 1].float(), case.keys[b][: i + 1].float()
    return pattern.selection(case.layer, query, at, keys, case.batch.host.page_size)[0]


def selection(case: Case, pattern: ContentPattern) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each sequence with rows that select: their selections by ``select`` and by ``selection``.

    Bool ``[rows, Hkv, length]`` each, in the layer's own window. Ranges must be ascending, disjoint and end
    with their query.
    """
    layer, batch = case.layer, case.batch
    rows = torch.from_numpy(batch.visible.selecting(pattern))
    positions_of = batch.device.positions
    spans = pattern.select(layer, case.query[rows], known(batch, rows), case.cache)
    begins, ends = spans.unbind(dim=-1)
    assert spans.shape[:2] == (len(rows), layer.kv_heads)
    assert ((begins >= 0) & (begins <= ends) & (ends <= positions_of[rows][:, None, None] + 1)).all()
    for begin, end in zip(begins.flatten(0, 1).tolist(), ends.flatten(0, 1).tolist(), strict=True):
        full = [span for span in zip(begin, end, strict=True) if span[0] != span[1]]
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(full))
    owners = batch.device.owners[rows]
    for b in owners.unique().tolist():
        mine, at = rows[owners == b], torch.arange(batch.host.seq_lens[b])
        ranges, positions = spans[owners == b][..., None], positions_of[mine]
        selected = ((at >= ranges[..., 0, :]) & (at < ranges[..., 1, :])).any(dim=2)
        query, keys = case.query[mine].float(), case.keys[b].float()
        defined = pattern.selection(layer, query, positions, keys, batch.host.page_size)
        if layer.window is not None:
            near = at > positions[:, None, None] - layer.window
            selected, defined = selected & near, defined & near
        yield selected, defined


def rows_selected(case: Case, pattern: ContentPattern, block_bytes: int) -> int:
    """How many rows select, as they are defined to, a block of so many bytes at a time."""
    rows = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BYTES", block_bytes)
        for selected, defined in selection(case, pattern):
            assert torch.equal(selected, defined)
            rows += len(selected)
    return rows


@st.composite
def layers(draw: st.DrawFn, features: bool = False) -> LayerSpec:
    kv_heads = draw(st.integers(1, 3))
    size = draw(st.sampled_from([1, 3, 8, 16]))
    return LayerSpec(
        index=0,
        query_heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_size=size,
        value_size=draw(st.sampled_from([size, 5])),
        scale=draw(st.sampled_from([size**-0.5, 1.0, 0.07])),
        window=draw(st.none() | st.integers(1, 50)),
        softcap=draw(st.none() | st.floats(0.5, 5)) if features else None,
        sinks=draw(st.booleans()) if features else False,
    )


def sequences(longest: int, most: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Decode rows, whole prompts and later chunks, mixed."""
    one = st.integers(1, longest).flatmap(
        lambda length: st.tuples(st.just(length), st.just(1) | st.just(length) | st.integers(1, length))
    )
    return st.lists(one, min_size=1, max_size=most)


patterns = st.one_of(
    st.just(Full()),
    st.builds(SlidingWindow, st.integers(1, 40), st.integers(0, 9)),
    st.builds(Longformer, st.integers(1, 40), st.integers(0, 9)),
    st.builds(Segment, st.integers(1, 40), st.integers(0, 9)),
    st.builds(BigBird, st.integers(1, 12), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99)),
)


def budgeted(kind: type[TopK]) -> st.SearchStrategy[TopK]:
    prefill = st.sampled_from(["dense", "sparse"])
    return st.builds(kind, st.integers(1, 90), st.integers(0, 3), st.integers(1, 4), prefill)


@st.composite
def content_patterns(draw: st.DrawFn) -> ContentPattern:
    if kind := draw(st.sampled_from([TopK, Oracle, None])):
        return draw(budgeted(kind))
    hashes, buckets = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 20) | st.just(200))
    return Lsh(hashes, buckets, draw(st.integers(1, 20)), draw(st.integers(0, 5)), draw(st.integers(0, 99)))
