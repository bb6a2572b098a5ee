"""Proves at start-up that a model answers through the paged cache as it does in transformers itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from attention.backends import Attention, UnsupportedError, resolve
from attention.cache import PagedCache
from attention.formats import format_name
from server.errors import RefusedError
from server.models.executors.base import Executor, PageTable, StepInput
from server.models.executors.choose import choose_executor
from server.models.loaded import LoadedModel
from server.models.non_finite import check_computed, check_held
from server.models.quantize import is_packed
from server.models.refusing import other_kernels

# The largest root mean square error of a position's logits, as a share of their standard deviation. Rounding
# stays well below; a bias, an offset or a mask that is lost shows as 0.1 to 1 nearly everywhere.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
# What a cache in another format than the model's adds; 0.004, 0.03 and 0.2 were met.
_CACHE_TOLERANCE = {torch.float32: 0.0, torch.float16: 0.015, torch.bfloat16: 0.08, torch.float8_e4m3fn: 0.5}
# The share of positions that must stay within it where rounding can do more: with 16 bits, and where a token
# can be sent to other experts, which changes its logits at will.
_SHARE = 0.75

# Tokens of two sequences, and up to where each is computed by the chunks: the second sequence begins beside
# the first one's second chunk. The rest are decode steps, which kernels compute by other code than chunks.
_LENGTHS = (40, 9)
_CHUNKS = ((24, 0), (36, 5))


def self_check(
    loaded: LoadedModel, attention: Attention, page_size: int, kv_dtype: torch.dtype
) -> torch.Tensor:
    """Compares the logits of two short sequences, in chunks and decode steps, with a plain forward of each.

    It catches what reading the layers can't: biases by distance, positions counted otherwise, tokens that
    mix outside attention, a kernel that computes something else.

    Args:
        loaded: the model; left as it was found.
        attention: pattern and kernel to be served. A pattern that hides tokens this near makes the
            comparison meaningless: it has to show each query the 40 tokens before it.
        page_size: tokens per page.
        kv_dtype: dtype of the cache; the check is sharpest with the model's own.

    Returns:
        The logits through the paged cache, as of ``sample_logits``.

    Raises:
        RefusedError: the logits differ, or the cache cannot hold the model's keys and values.
    """
    model, sequences = loaded.model, _sequences(loaded)
    with torch.inference_mode():
        served = torch.cat(_paged(loaded, attention, page_size, kv_dtype, sequences))
        model.set_attn_implementation("eager")
        try:
            plain = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
        finally:
            model.set_attn_implementation("longspan")
    check_computed(loaded, torch.cat(plain))
    check_held(loaded, served, kv_dtype)
    error = relative_error(served, torch.cat(plain))
    decoded = torch.cat(
        [torch.arange(len(ids)) >= end for ids, end in zip(sequences, _CHUNKS[-1], strict=True)]
    )
    tolerance = _TOLERANCE[loaded.dtype]
    if kv_dtype != loaded.dtype:
        tolerance += _CACHE_TOLERANCE[kv_dtype]
    strict = loaded.dtype == kv_dtype == torch.float32 and not _has_experts(model.config)
    share = 1.0 if strict else _SHARE
    # Few positions are decoded: among all, their errors would hide behind the share that may differ.
    parts = [error[where] for where in (~decoded, decoded) if where.any()]
    if not all(part.quantile(share) <= tolerance for part in parts):
        if _counts_otherwise(model, sequences, plain):
            raise RefusedError(
                f"{loaded.architecture} cannot be served: left to itself it counts a text's positions in "
                "another way than 0, 1, 2 and so on, as RoBERTa's family does, which begins after the number "
                "of its padding token; choose another architecture"
            )
        raise RefusedError(
            f"{loaded.architecture} does not go through the attention interface in a way that Longspan can "
            f"serve: its logits differ by up to {float(error.max()):.2g} of their standard deviation from "
            f"those of transformers itself (up to {tolerance:g} is rounding); choose another architecture"
            f"{other_kernels(attention.kernel.name)}"
        )
    return served


def _counts_otherwise(model: Any, sequences: list[torch.Tensor], plain: list[torch.Tensor]) -> bool:
    """Whether ``plain``, the logits by positions of the model's own, are not those by 0, 1, 2 and so on."""
    ids = sequences[0]
    at = torch.arange(len(ids), device=ids.device)
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        try:
            counted = model(input_ids=ids[None], position_ids=at[None], use_cache=False).logits[0]
        finally:
            model.set_attn_implementation("longspan")
    return bool(relative_error(counted, plain[0]).max() > _TOLERANCE[plain[0].dtype])


# Packed weights and rounded activations change logits by a few hundredths where the weights are exact, and by
# some tenths where 4 bits are too few for them; an operator that computes something else, by about 1 or more.
_PACKED_TOLERANCE = 0.5


def sample_logits(
    loaded: LoadedModel, attention: Attention, page_size: int, kv_dtype: torch.dtype
) -> torch.Tensor:
    """Logits ``[T, V]`` of two short sequences, through the paged cache; arguments as of ``self_check``.

    Raises:
        RefusedError: the cache cannot hold the model's keys and values.
    """
    with torch.inference_mode():
        logits = torch.cat(_paged(loaded, attention, page_size, kv_dtype, _sequences(loaded)))
    check_held(loaded, logits, kv_dtype)
    return logits


def _sequences(loaded: LoadedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, loaded.context_length) for length in _LENGTHS]
    return [
        torch.randint(loaded.vocabulary_size, (length,), generator=generator).to(loaded.model.device)
        for length in lengths
    ]


def served_check(before: torch.Tensor, after: torch.Tensor, weights: str, kv_dtype: torch.dtype) -> None:
    """Compares the logits of ``self_check`` with ``sample_logits`` of what is going to serve.

    Args:
        before: with float weights and, where the kernel can, a cache in the model's own format.
        after: with weights and cache as they serve.
        weights: what they are now, as ``quantize`` says.
        kv_dtype: dtype of the cache.

    Raises:
        RefusedError: packing, or the cache, changed more than rounding can.
    """
    packed = is_packed(weights)
    error = float(relative_error(after, before).median())
    tolerance = _PACKED_TOLERANCE if packed else _CACHE_TOLERANCE[kv_dtype]
    if not error <= tolerance:
        raise RefusedError(
            f"with {weights} weights and a KV cache in {format_name(kv_dtype)} the model's logits differ by "
            f"{error:.2g} of their standard deviation from those without either's rounding (up to "
            f"{tolerance:g} is rounding); choose "
            + (
                "--weights float, or int8 for a model that int4 or fp8 is too coarse for"
                if packed
                else "--kv-dtype auto"
            )
        )


# A packed model made of its parts, by the same kernel.
_PARTS_TOLERANCE = 0.05
# A packed model from one start to the next. Kernels, machines and caches add numbers in another order, which
# sends what lies halfway between two codes of an activation the other way; layers make of that what rounding
# activations does at all: 0.034 to 0.046 were met, whatever the kernel and the cache's format.
_REPEATED_TOLERANCE = 0.15
# Logits of a position that are kept to compare by.
_COLUMNS = 4096


def oracle_logits(loaded: LoadedModel) -> torch.Tensor:
    """``sample_logits`` by the reference kernel over a cache that rounds nothing, ``[T, at most 8191]``.

    Evenly spread over the vocabulary where that is larger.
    """
    attention = resolve("full", {}, "reference", loaded.layers, loaded.model.device, loaded.dtype, 16)
    logits = sample_logits(loaded, attention, 16, loaded.dtype)
    return _spread(logits)


def differs(
    kept: torch.Tensor, now: torch.Tensor, *, kv_dtype: torch.dtype = torch.float32, same_kernel: bool = False
) -> str:
    """Compares what a packed model computes now with what it did when it was proven.

    Args:
        kept: its ``oracle_logits``.
        now: the same, or its ``sample_logits`` by any kernel over any cache.
        kv_dtype: dtype of the cache that ``now`` was computed over.
        same_kernel: ``now`` comes of ``oracle_logits`` in the same process, so that it must be nearer.

    Returns:
        How they differ, part of a sentence; empty if only as rounding can.
    """
    if now.shape[1] != kept.shape[1]:
        now = _spread(now)
    if now.shape != kept.shape:
        return f"it gives {list(now.shape)} logits instead of {list(kept.shape)}"
    tolerance = _PARTS_TOLERANCE if same_kernel else max(_REPEATED_TOLERANCE, _CACHE_TOLERANCE[kv_dtype])
    error = float(relative_error(now, kept).quantile(_SHARE))
    if error <= tolerance:
        return ""
    return (
        f"its logits differ by {error:.2g} of their standard deviation from those that were proven (up to "
        f"{tolerance:g} is rounding)"
    )


def _spread(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :: max(1, logits.shape[1] // _COLUMNS)].float()


def relative_error(served: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """How far logits ``[T, V]`` differ at each position, ``[T]``.

    The root mean square over the vocabulary, as a share of the standard deviation of ``plain`` there; what
    is NaN counts as infinite.
    """
    # Squares of large logits would be beyond float32.
    served, plain = served.double(), plain.double()
    error = (served - plain).square().mean(-1).sqrt() / plain.std(-1).clamp_min(1e-6)
    return error.nan_to_num(nan=float("inf"))


def _paged(
    loaded: LoadedModel,
    attention: Attention,
    page_size: int,
    kv_dtype: torch.dtype,
    sequences: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Logits ``[T, V]`` of each sequence, all in one cache whose unwritten memory is poisoned."""
    device = loaded.model.device
    counts = [-(-len(ids) // page_size) for ids in sequences]
    cache = PagedCache(loaded.layers, sum(counts) + 1, page_size, kv_dtype, device, poison=True)
    # From the last page down, so that no sequence's pages lie in order.
    pages = [list(range(sum(counts[: b + 1]), sum(counts[:b]), -1)) for b in range(len(counts))]
    executor = choose_executor(loaded, attention, cache)
    tables = [PageTable(of) for of in pages]
    lengths = [len(ids) for ids in sequences]
    decodes = max(length - end for length, end in zip(_LENGTHS, _CHUNKS[-1], strict=True))
    steps = [[0] * len(lengths), *_CHUNKS, *([end + n for end in _CHUNKS[-1]] for n in range(1, decodes + 1))]
    ends = [[*map(min, step, lengths)] for step in steps]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in ([*map(range, *pair)] for pair in pairwise(ends)):
        rows = [b for b, span in enumerate(step) if span]
        if not rows:
            continue
        work = StepInput(
            ids=torch.cat([sequences[b][step[b].start : step[b].stop] for b in rows]),
            computed=[step[b].start for b in rows],
            counts=[len(step[b]) for b in rows],
            prompt_lens=[lengths[b] for b in rows],
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
    return [torch.cat(parts) for parts in logits]


def _served(executor: Executor, step: StepInput, *, some: bool) -> torch.Tensor:
    """Logits ``[T, V]`` as serving asks for them: of all rows, or of some, in any order."""
    if not some:
        return executor.logits(step).clone()
    backwards = range(len(step.ids))[::-1]
    rows = [part for part in (backwards[::2], backwards[1::2]) if len(part)]
    logits = torch.cat([executor.logits(replace(step, rows=part)).clone() for part in rows])
    return logits[torch.tensor([row for part in rows for row in part]).argsort()]


def _has_experts(config: Any) -> bool:
    text = config.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)
