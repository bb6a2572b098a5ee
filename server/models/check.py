"""Proves at start-up that a model answers through the paged cache as it does in transformers itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from attention.backends import Attention
from attention.hook import Step
from attention.types import AttentionBatch, PagedCache
from server.engine.types import RefusedError
from server.models.load import LoadedModel

# The largest root mean square error of a position's logits, as a share of their standard deviation. Rounding
# stays well below; a bias, an offset or a mask that is lost shows as 0.1 to 1 nearly everywhere.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
# The share of positions that must stay within it where rounding can do more: with 16 bits, and where a token
# can be sent to other experts, which changes its logits at will.
_SHARE = 0.75

# Tokens of two sequences, and how many of each the first of two steps computes: the second sequence begins
# beside the first one's rest.
_LENGTHS = (40, 9)
_FIRST_STEP = (24, 0)


def self_check(loaded: LoadedModel, attention: Attention, page_size: int) -> None:
    """Compares the logits of two short sequences, batched and in chunks, with a plain forward of each.

    It catches what reading the layers can't: biases by distance, positions counted otherwise, tokens that
    mix outside attention, a kernel that computes something else.

    Args:
        loaded: the model; left as it was found.
        attention: pattern and kernel to be served. A pattern that hides tokens this near makes the
            comparison meaningless: it has to show each query the 40 tokens before it.
        page_size: tokens per page.

    Raises:
        RefusedError: the logits differ.
    """
    model, sequences = loaded.model, _sequences(loaded)
    with torch.inference_mode():
        served = _paged(loaded, attention, page_size, sequences)
        model.set_attn_implementation("eager")
        try:
            plain = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
        finally:
            model.set_attn_implementation("longspan")
    error = relative_error(torch.cat(served), torch.cat(plain))
    tolerance = _TOLERANCE[loaded.dtype]
    strict = loaded.dtype == torch.float32 and not _has_experts(model.config)
    if not error.quantile(1.0 if strict else _SHARE) <= tolerance:
        raise RefusedError(
            f"{loaded.architecture} does not go through the attention interface in a way that Longspan can "
            f"serve: its logits differ by up to {float(error.max()):.2g} of their standard deviation from "
            f"those of transformers itself (up to {tolerance:g} is rounding); choose another architecture"
            + ("" if attention.kernel.name == "reference" else ", or try --kernel reference")
        )


# Packed weights and rounded activations change logits by a few hundredths where the weights are exact, and by
# some tenths where 4 bits are too few for them; an operator that computes something else, by about 1 or more.
_PACKED_TOLERANCE = 0.5


def sample_logits(loaded: LoadedModel, attention: Attention, page_size: int) -> torch.Tensor:
    """Logits ``[T, V]`` of two short sequences, through the paged cache; arguments as of ``self_check``."""
    with torch.inference_mode():
        return torch.cat(_paged(loaded, attention, page_size, _sequences(loaded)))


def _sequences(loaded: LoadedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, loaded.context_length) for length in _LENGTHS]
    return [
        torch.randint(loaded.vocabulary_size, (length,), generator=generator).to(loaded.model.device)
        for length in lengths
    ]


def packed_check(before: torch.Tensor, after: torch.Tensor, weights: str) -> None:
    """Compares ``sample_logits`` from before and after weights were packed.

    Raises:
        RefusedError: packing changed more than rounding can.
    """
    error = relative_error(after, before)
    if not float(error.median()) <= _PACKED_TOLERANCE:
        raise RefusedError(
            f"with {weights} weights the model's logits differ by {float(error.median()):.2g} of their "
            f"standard deviation from those with float weights (up to {_PACKED_TOLERANCE:g} is rounding); "
            "choose --weights float, or int8 for a model that 4 bits are too few for"
        )


def relative_error(served: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """How far logits ``[T, V]`` differ at each position, ``[T]``.

    The root mean square over the vocabulary, as a share of the standard deviation of ``plain`` there; what
    is no number counts as infinite.
    """
    served, plain = served.float(), plain.float()
    error = (served - plain).square().mean(-1).sqrt() / plain.std(-1).clamp_min(1e-6)
    return error.nan_to_num(nan=float("inf"))


def _paged(
    loaded: LoadedModel, attention: Attention, page_size: int, sequences: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Logits ``[T, V]`` of each sequence, all in one cache whose unwritten memory is poisoned."""
    device = loaded.model.device
    counts = [-(-len(ids) // page_size) for ids in sequences]
    cache = PagedCache(loaded.layers, sum(counts) + 1, page_size, loaded.dtype, device, poison=True)
    # From the last page down, so that no sequence's pages lie in order.
    pages = [list(range(sum(counts[: b + 1]), sum(counts[:b]), -1)) for b in range(len(counts))]
    layers = {layer.index: layer for layer in loaded.layers}
    first = [range(min(end, len(ids))) for ids, end in zip(sequences, _FIRST_STEP, strict=True)]
    rest = [range(span.stop, len(ids)) for ids, span in zip(sequences, first, strict=True)]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in (first, rest):
        rows = [b for b, span in enumerate(step) if span]
        batch = AttentionBatch.build(
            [step[b].start for b in rows],
            [len(step[b]) for b in rows],
            [pages[b] for b in rows],
            page_size,
            device,
        )
        with _own_lengths(loaded, [step[b] for b in rows], [len(sequences[b]) for b in rows]):
            output = loaded.model(
                input_ids=torch.cat([sequences[b][step[b].start : step[b].stop] for b in rows])[None],
                position_ids=batch.positions[None],
                use_cache=False,
                longspan=Step(attention, cache, batch, layers),
            ).logits[0]
        for b, part in zip(rows, output.split([len(step[b]) for b in rows]), strict=True):
            logits[b].append(part)
    return [torch.cat(parts) for parts in logits]


def _own_lengths(loaded: LoadedModel, spans: list[range], lengths: list[int]) -> AbstractContextManager[None]:
    """Rotary frequencies of each sequence's own length, where they depend on it."""
    if loaded.rope is None:
        return nullcontext()
    starts, counts = [span.start for span in spans], [len(span) for span in spans]
    return loaded.rope.step(loaded.rope.lengths(starts, counts, lengths, lengths))


def _has_experts(config: Any) -> bool:
    text = config.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)
