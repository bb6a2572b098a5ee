"""Proves at start-up that a model answers through the paged cache as it does in transformers itself.

Once and strictly, in float32, before anything is rounded; the served form is then compared with that, within
its own rounding.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from attention.backends import Attention, UnsupportedError, resolve
from attention.dtypes import dtype_name
from attention.patterns.full import Full
from server.errors import RefusedError
from server.models.difference import cache_tolerance, relative_error
from server.models.in_float32 import in_float32
from server.models.loaded import LoadedModel
from server.models.logits import decoded, own_logits, paged_logits, sequences_of
from server.models.non_finite import check_computed, check_held
from server.models.refusing import other_kernels

log = logging.getLogger("longspan.models")

# The largest root mean square error of a position's logits, as a share of their standard deviation. In
# float32 the order of sums makes 1e-5, and a bias, an offset or a scale that is lost 0.001 to 1; in 16 bits
# only what is lost everywhere shows.
_TOLERANCE = {torch.float32: 3e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
# Packed weights and rounded activations change logits by a few hundredths where the weights are exact, and by
# some tenths where 4 bits are too few for them; an operator that computes something else, by about 1 or more.
_PACKED_TOLERANCE = 0.5
# The share of positions that must stay within it where rounding can do more: with 16 bits, and where a token
# can be sent to other experts, which changes its logits at will.
_SHARE = 0.75
# Tokens from which on kernels cut a query's keys into parts: 128 on a CPU, on CUDA 256 to a part.
_CUT = {"cpu": 128}
_CUT_ELSEWHERE = 600


@dataclass(frozen=True, slots=True)
class Own:
    """The logits of transformers itself.

    Attributes:
        logits: ``[T, V]`` of each of the sequences that ``sequences_of`` gives, on the host.
        dtype: in which they were computed: float32, or the model's own where that was not possible.
    """

    logits: list[torch.Tensor]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Proven:
    """Logits through the paged cache that are those of transformers itself.

    Attributes:
        logits: ``[T, V]`` of each sequence, on the host.
        kernel: that computed attention.
        dtype: of everything, the cache included.
    """

    logits: list[torch.Tensor]
    kernel: str
    dtype: torch.dtype


def compute_own(loaded: LoadedModel, page_size: int) -> Own:
    """A plain forward of transformers over some sequences, in float32.

    The longest has at least three pages, and keys enough for kernels to cut them into parts, as far as the
    context goes.

    Args:
        loaded: the model as it was loaded, none of its modules replaced; it is left as it was found.
        page_size: of the cache that is to serve, in tokens.

    Raises:
        RefusedError: the logits are NaN or infinite.
    """
    sequences = sequences_of(loaded, _length(loaded, page_size))
    dtype = torch.float32
    try:
        with in_float32(loaded.model):
            logits = own_logits(loaded.model, sequences)
    except torch.OutOfMemoryError as error:
        log.warning("there is no memory for float32 copies of %s's weights: %s", loaded.architecture, error)
        logits = []
    except RuntimeError as error:  # of dtypes that don't go together
        if loaded.dtype == torch.float32:
            raise
        log.debug("%s does not compute in float32", loaded.architecture, exc_info=error)
        logits = []
    if not logits or any(part.dtype != torch.float32 for part in logits):
        log.warning(
            "%s does not compute in float32 with weights in %s: it is proven in %s, which shows less",
            *(loaded.architecture, dtype_name(loaded.dtype), dtype_name(loaded.dtype)),
        )
        dtype = loaded.dtype
        logits = own_logits(loaded.model, sequences)
    check_computed(loaded, torch.cat(logits), dtype)
    return Own(logits, dtype)


def prove(loaded: LoadedModel, own: Own, attention: Attention, page_size: int) -> Proven:
    """Compares the logits of sequences, in chunks and decode steps, with those of transformers itself.

    It catches what reading the layers can't: biases by distance, positions counted otherwise, tokens that
    mix outside attention, a kernel that computes something else, a lean layer that does.

    Args:
        loaded: the model, its weights not packed; left as it was found.
        own: what ``compute_own`` gave.
        attention: what is to serve. Its kernel computes this too where it reads a cache that rounds nothing;
            with all tokens visible, since tokens that a pattern hides would look like a fault.
        page_size: tokens per page.

    Returns:
        The results that later forms of the model can be compared with.

    Raises:
        RefusedError: the logits differ.
    """
    sequences = sequences_of(loaded, _length(loaded, page_size))
    exact = with_all_visible(attention, loaded, own.dtype, page_size)
    with in_float32(loaded.model) if own.dtype == torch.float32 else nullcontext():
        served = paged_logits(loaded, exact, page_size, own.dtype, sequences)
    strict = own.dtype == torch.float32 and not _has_experts(loaded.model.config)
    errors = _errors(served, own.logits)
    tolerance = _TOLERANCE[own.dtype]
    if not _within(errors, tolerance, 1.0 if strict else _SHARE):
        if _counts_otherwise(loaded.model, sequences[0]):
            raise RefusedError(
                f"{loaded.architecture} cannot be served: left to itself it counts a text's positions in "
                "another way than 0, 1, 2 and so on, as RoBERTa's family does, which begins after the number "
                "of its padding token; choose another architecture"
            )
        raise RefusedError(
            f"{loaded.architecture} does not go through the attention interface in a way that Longspan can "
            f"serve: its logits differ by up to {max(float(error.max()) for error in errors):.2g} of their "
            f"standard deviation from those of transformers itself (up to {tolerance:g} is rounding); choose "
            f"another architecture{other_kernels(exact.kernel.name)}"
        )
    return Proven(served, exact.kernel.name, own.dtype)


def check_served(
    loaded: LoadedModel,
    proven: Proven,
    attention: Attention,
    page_size: int,
    kv_dtype: torch.dtype,
    *,
    weights: str,
    packed: bool,
) -> None:
    """Compares the model as it will serve with the proven logits, where weights or dtypes differ.

    Args:
        loaded: the model as it serves.
        proven: what ``prove`` gave for it.
        attention: what is to serve; see ``with_all_visible``.
        page_size: tokens per page.
        kv_dtype: dtype of the cache.
        weights: what they are now, in words.
        packed: they are packed.

    Raises:
        RefusedError: packing, the dtype or the cache changed more than rounding can, or the cache cannot hold
            the model's keys and values.
    """
    attention = with_all_visible(attention, loaded, kv_dtype, page_size)
    same = loaded.dtype == kv_dtype == proven.dtype and attention.kernel.name == proven.kernel
    if same and not packed:
        return
    sequences = sequences_of(loaded, len(proven.logits[0]))
    served = paged_logits(loaded, attention, page_size, kv_dtype, sequences)
    check_held(loaded, torch.cat(served), kv_dtype)
    check_computed(loaded, torch.cat(served), loaded.dtype)
    errors = _errors(served, proven.logits)
    tolerance = _TOLERANCE[loaded.dtype] + cache_tolerance(loaded.dtype, kv_dtype)
    if packed:
        tolerance = _PACKED_TOLERANCE
    if packed:  # rounding is everywhere the same
        errors = [torch.cat(errors)]
    if _within(errors, tolerance, 0.5 if packed else _SHARE):
        return
    raise RefusedError(
        f"with {weights} weights, the {attention.kernel.name} kernel and a KV cache in "
        f"{dtype_name(kv_dtype)} the logits of {loaded.architecture} differ by "
        f"{float(torch.cat(errors).median()):.2g} of their standard deviation from those without rounding "
        f"(up to {tolerance:g} is rounding); choose "
        + (
            "--weights float, or int8 for a model that int4 or fp8 is too coarse for"
            if packed
            else "--kv-dtype auto"
            if kv_dtype != loaded.dtype
            else f"--dtype float32{other_kernels(attention.kernel.name)}"
        )
    )


def with_all_visible(
    attention: Attention, loaded: LoadedModel, kv_dtype: torch.dtype, page_size: int
) -> Attention:
    """Full attention over a cache of this dtype, by the same kernel where it can, else by the first that can.

    Raises:
        RefusedError: none can.
    """
    place = loaded.model.device, kv_dtype, page_size
    whole = replace(attention, backend="full", pattern=Full(), family=False)
    if not whole.kernel.unsupported(loaded.layers, *place, whole.pattern):
        return whole
    try:
        return resolve("full", {}, "auto", loaded.layers, *place)
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error


def _length(loaded: LoadedModel, page_size: int) -> int:
    """The length of the longer sequence."""
    return max(3 * page_size, _CUT.get(loaded.model.device.type, _CUT_ELSEWHERE)) + 16


def _errors(served: list[torch.Tensor], plain: list[torch.Tensor]) -> list[torch.Tensor]:
    """Errors of prompts' positions and of decoded ones apart: there are few of the latter, which could all be
    in the share that may differ."""
    errors = [relative_error(*pair) for pair in zip(served, plain, strict=True)]
    decodes = [decoded(len(error)) for error in errors]
    prompts = [error[: len(error) - n] for error, n in zip(errors, decodes, strict=True)]
    rest = [error[len(error) - n :] for error, n in zip(errors, decodes, strict=True)]
    return [part for part in (torch.cat(prompts), torch.cat(rest)) if len(part)]


def _within(errors: list[torch.Tensor], tolerance: float, share: float) -> bool:
    return all(bool(error.quantile(share) <= tolerance) for error in errors)


def _counts_otherwise(model: Any, ids: torch.Tensor) -> bool:
    """Whether the model's positions, left to itself, are not 0, 1, 2 and so on."""
    at = torch.arange(len(ids), device=ids.device)
    try:
        (given,), (own,) = own_logits(model, [ids], at), own_logits(model, [ids])
    except UnsupportedError:  # of lean layers, which are given their positions
        return False
    return bool(relative_error(given, own).max() > _TOLERANCE[model.dtype])


def _has_experts(config: Any) -> bool:
    text = config.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)
