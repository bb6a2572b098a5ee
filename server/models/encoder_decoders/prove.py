"""Proves at start-up that an encoder-decoder over its paged cache computes what transformers itself does."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from attention.backends import Attention
from attention.cache import PagedCache
from server.encoder_messages import EncoderDecoderInfo
from server.errors import RefusedError
from server.models.difference import cache_tolerance, relative_error
from server.models.executors.base import PageTable, StepInput, filled
from server.models.executors.encoder_decoder import EncoderDecoderExecutor
from server.models.global_token import first_token_global
from server.models.loaded import LoadedModel

log = logging.getLogger("longspan.models")

# The largest root mean square error of a token's logits, as a share of their standard deviation. In float32
# the order of sums makes 1e-5, but 3e-4 for one token of 128 of a random model; a position, bias or source
# that is mixed up 0.001 to 1.
_TOLERANCE = {torch.float32: 6e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
# Tokens of sources and of their targets. Two sources are alike in length.
_LENGTHS = ((1, 3), (7, 9), (7, 1), (150, 140))
# A first chunk ends within most sources, a second one within targets; then come decodes.
_FIRST, _DECODES = 5, 4


@dataclass(frozen=True, slots=True)
class Own:
    """The results of transformers itself.

    Attributes:
        pairs: token ids of sources and of their targets.
        logits: ``[T, V]`` of each target, on the host.
    """

    pairs: list[tuple[list[int], list[int]]]
    logits: list[torch.Tensor]


@torch.inference_mode()
def compute_own(model: Any, info: EncoderDecoderInfo) -> Own:
    """A plain forward over pairs of random tokens, one by one.

    Args:
        model: as transformers loaded it.
        info: tokens of a source, and of a target, at most.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(
        model.get_output_embeddings().weight.shape[0], model.get_input_embeddings().num_embeddings
    )

    def draw(count: int, most: int) -> list[int]:
        return torch.randint(
            min(5, vocabulary - 1), vocabulary, (min(count, most),), generator=generator
        ).tolist()

    pairs = [
        (draw(source, info.source_length), draw(target, info.target_length)) for source, target in _LENGTHS
    ]
    logits = [
        model(
            input_ids=(ids := torch.tensor([source], device=model.device)),
            decoder_input_ids=torch.tensor([target], device=model.device),
            use_cache=False,
            **first_token_global(model, ids),
        )
        .logits[0]
        .cpu()
        for source, target in pairs
    ]
    return Own(pairs, logits)


def prove(loaded: LoadedModel, own: Own, attention: Attention, page_size: int, kv_dtype: torch.dtype) -> None:
    """Compares all pairs in one batch, in chunks and decode steps, with what transformers computed.

    Args:
        loaded: the model, with its halves.
        own: what transformers computed with it.
        attention: pattern and kernel that are to serve.
        page_size: tokens per page.
        kv_dtype: dtype of the KV cache.

    Raises:
        RefusedError: they differ.
    """
    served = _served(loaded, own, attention, page_size, kv_dtype)
    errors = torch.cat([relative_error(*pair) for pair in zip(served, own.logits, strict=True)])
    tolerance = _TOLERANCE[loaded.dtype] + cache_tolerance(loaded.dtype, kv_dtype)
    exact = loaded.dtype == kv_dtype == torch.float32
    error = float(errors.quantile(1.0 if exact else 0.75))
    if not error <= tolerance:
        raise RefusedError(
            f"{loaded.architecture} cannot be served: its logits through the paged cache differ by "
            f"{error:.2g} of their standard deviation from those of transformers itself (up to {tolerance:g} "
            "is rounding); choose another model"
        )
    log.info("%s over pages is as in transformers, within %.1g", loaded.architecture, error)


def _served(
    loaded: LoadedModel, own: Own, attention: Attention, page_size: int, kv_dtype: torch.dtype
) -> list[torch.Tensor]:
    device = loaded.model.device
    starts = [filled(len(source), page_size) for source, _ in own.pairs]
    tokens = [
        source + [0] * (start - len(source)) + target
        for (source, target), start in zip(own.pairs, starts, strict=True)
    ]
    tables, pages = [], 1
    for one in tokens:
        count = -(-len(one) // page_size)
        tables.append(PageTable(list(range(pages, pages + count))))
        pages += count
    cache = PagedCache(
        loaded.layers, pages, page_size, kv_dtype, device, pattern=attention.pattern, poison=True
    )
    executor = EncoderDecoderExecutor(loaded, attention, cache, "a proof")
    found: list[list[torch.Tensor]] = [[] for _ in tokens]
    done = [0] * len(tokens)
    while active := [b for b, one in enumerate(tokens) if done[b] < len(one)]:
        counts = [_count(done[b], len(tokens[b])) for b in active]
        places = [(b, done[b] + i) for b, n in zip(active, counts, strict=True) for i in range(n)]
        rows = [row for row, (b, place) in enumerate(places) if place >= starts[b]]
        step = StepInput(
            ids=torch.tensor([tokens[b][place] for b, place in places], device=device),
            computed=[done[b] for b in active],
            counts=counts,
            prompt_lens=[starts[b] + 1 for b in active],
            expected=[len(tokens[b]) for b in active],
            tables=[tables[b] for b in active],
            page_size=page_size,
            rows=rows,
            sources=[own.pairs[b][0] for b in active],
        )
        logits = executor.logits(step).cpu()
        for row, at in enumerate(rows):
            found[places[at][0]].append(logits[row])
        for b, n in zip(active, counts, strict=True):
            done[b] += n
    return [torch.stack(logits) for logits in found]


def _count(done: int, total: int) -> int:
    """Tokens of the next step."""
    if done == 0:
        return min(_FIRST, total)
    return max(1, total - _DECODES - done)
