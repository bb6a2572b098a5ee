"""Logits of two sequences: as they are served, through the paged cache, and as transformers computes them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from attention.backends import Attention, UnsupportedError
from attention.cache import PagedCache
from server.errors import RefusedError
from server.models.executors.base import Executor, PageTable, StepInput
from server.models.executors.choose import choose_executor
from server.models.loaded import LoadedModel

# Tokens of the second sequence, which begins in the step of the first one's second chunk.
_SHORT = 9
# The last tokens are decode steps, which kernels compute by other code than chunks.
_DECODES = 4
# The first sequence's second chunk.
_SECOND = 12


def sequences_of(loaded: LoadedModel, length: int) -> list[torch.Tensor]:
    """Token ids of two sequences, always the same, the first of this length where the context allows it."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(most, loaded.context_length) for most in (length, _SHORT)]
    return [
        torch.randint(loaded.vocabulary_size, (length,), generator=generator).to(loaded.model.device)
        for length in lengths
    ]


def decoded(length: int) -> int:
    """How many of a sequence's tokens are decode steps."""
    return min(_DECODES, length // 2)


def own_logits(
    model: Any, sequences: list[torch.Tensor], positions: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Logits ``[T, V]`` of each sequence, on the host, by transformers' plain forward.

    Args:
        model: of transformers.
        sequences: token ids ``[T]``.
        positions: of all of them ``[T]``; ``None`` for what the model itself takes.
    """
    given = {} if positions is None else {"position_ids": positions[None]}
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        try:
            return [model(input_ids=ids[None], use_cache=False, **given).logits[0].cpu() for ids in sequences]
        finally:
            model.set_attn_implementation("longspan")


@torch.inference_mode()
def paged_logits(
    loaded: LoadedModel,
    attention: Attention,
    page_size: int,
    kv_dtype: torch.dtype,
    sequences: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Logits ``[T, V]`` of each sequence, on the host, all in one paged cache, in chunks and decode steps.

    The cache's unwritten memory is poisoned.

    Args:
        loaded: the model.
        attention: pattern and kernel.
        page_size: tokens per page.
        kv_dtype: dtype of the cache.
        sequences: what ``sequences_of`` gave.

    Raises:
        RefusedError: the model can't be asked for them.
    """
    device = loaded.model.device
    counts = [-(-len(ids) // page_size) for ids in sequences]
    cache = PagedCache(loaded.layers, sum(counts) + 1, page_size, kv_dtype, device, poison=True)
    # From the last page down, so that no sequence's pages lie in order.
    pages = [list(range(sum(counts[: b + 1]), sum(counts[:b]), -1)) for b in range(len(counts))]
    executor = choose_executor(loaded, attention, cache)
    tables = [PageTable(of) for of in pages]
    lengths = [len(ids) for ids in sequences]
    # Decoded tokens are no prompt's, so that kernels take their code for decode. But plain forwards have the
    # rotary frequencies of their whole length.
    prompts = lengths if loaded.rope is not None else [length - decoded(length) for length in lengths]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in ([*map(range, *pair)] for pair in pairwise(_ends(lengths))):
        rows = [b for b, span in enumerate(step) if span]
        if not rows:
            continue
        work = StepInput(
            ids=torch.cat([sequences[b][step[b].start : step[b].stop] for b in rows]),
            computed=[step[b].start for b in rows],
            counts=[len(step[b]) for b in rows],
            prompt_lens=[prompts[b] for b in rows],
            expected=[lengths[b] for b in rows],
            tables=[tables[b] for b in rows],
            page_size=page_size,
        )
        try:
            output = _served(executor, work, some=step[0].start > 0)
        except UnsupportedError as error:
            raise RefusedError(
                f"{loaded.architecture} cannot be served: {error}; choose another model"
            ) from error
        for b, part in zip(rows, output.split([len(step[b]) for b in rows]), strict=True):
            logits[b].append(part)
    return [torch.cat(parts).cpu() for parts in logits]


def _ends(lengths: list[int]) -> list[list[int]]:
    """Up to where each sequence is computed after each step, the state before the first included."""
    long, short = (length - decoded(length) for length in lengths)
    chunks = [[max(long - _SECOND, long // 2), 0], [long, short]]
    decodes = [[long + n, short + n] for n in range(1, _DECODES + 1)]
    return [[*map(min, step, lengths)] for step in ([0, 0], *chunks, *decodes)]


def _served(executor: Executor, step: StepInput, *, some: bool) -> torch.Tensor:
    """Logits ``[T, V]`` as serving asks for them: of all rows, or of some, in any order."""
    if not some:
        return executor.logits(step).clone()
    backwards = range(len(step.ids))[::-1]
    rows = [part for part in (backwards[::2], backwards[1::2]) if len(part)]
    logits = torch.cat([executor.logits(replace(step, rows=part)).clone() for part in rows])
    return logits[torch.tensor([row for part in rows for row in part]).argsort()]
