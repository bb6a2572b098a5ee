"""From settings and a model folder to a model that is checked with the attention that is to serve it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attention.backends import Attention, UnsupportedError, make_pattern, resolve
from attention.dtypes import CACHE_DTYPES
from server.encoder_messages import EncoderDecoderInfo
from server.engine.native import log_native, set_native_level
from server.errors import RefusedError
from server.models.kept import KeptModel, keep, kept_file, made_from, read_kept, why_not_kept
from server.models.lay_out import lay_out
from server.models.loaded import LoadedModel
from server.models.prove import Proven, check_served, compute_own, prove, with_all_visible
from server.models.prove_kernel import prove_kernel
from server.models.quantize import check_form, is_packed
from server.models.refusing import other_kernels, refusing
from server.models.rope import read_scaling
from server.models.sample import differs, oracle_logits, sample_logits
from server.settings import Settings
from server.sizes import Sizes

log = logging.getLogger("longspan.engine")

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is ready to be served.

    Attributes:
        loaded: the model.
        device: ``cpu`` or ``cuda``.
        weights: form of the weights inside the decoder, as ``quantize`` says.
        kv_dtype: dtype of the KV cache.
        attention: pattern and kernel.
        encoder_decoder: what is known of an encoder-decoder; ``None`` for a decoder.
    """

    loaded: LoadedModel
    device: str
    weights: str
    kv_dtype: torch.dtype
    attention: Attention
    encoder_decoder: EncoderDecoderInfo | None = None


def prepare(settings: Settings, folder: Path, report: Report) -> Prepared:
    """Loads the model, chooses its attention and checks the two together.

    Packed weights that an earlier start kept are used where they are still good; else the model is loaded
    with transformers, packed, and kept for the next start where that is possible.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        report: told what is going on, with the share done.

    Raises:
        RefusedError: the model, the settings and the machine don't go together; the sentence says why.
    """
    device = chosen_device(settings)
    page_size = Sizes.of(settings, device).page_size
    code = set_native_level(settings)
    if device == "cpu":
        log_native(code)
    check_form(settings.weights, device)
    file = kept_file(folder, settings.weights, settings.cache_dir) if _may_be_packed(settings) else None
    if file is not None and file.is_file():
        report("reading the packed weights", 0.3)
        kept = read_kept(file, folder, max_context=settings.max_context, reach=_reach(settings))
        if kept is not None and (prepared := _from_kept(settings, page_size, kept, file, report)) is not None:
            return prepared
    return _from_source(settings, page_size, folder, file, report)


def _may_be_packed(settings: Settings) -> bool:
    return (
        settings.weights != "float"
        and chosen_device(settings) == "cpu"
        and settings.dtype in ("auto", "float32")
        and settings.rope_scaling is None
        and not settings.rope_option
    )


def _from_kept(
    settings: Settings, page_size: int, kept: KeptModel, file: Path, report: Report
) -> Prepared | None:
    report("checking", 0.8)
    loaded, weights = kept.loaded, kept.weights
    kv_dtype = cache_dtype(settings, loaded, weights)
    attention = choose_attention(settings, page_size, loaded, "cpu", kv_dtype, weights)
    whole = replace(loaded, context_length=kept.length)
    check_with = with_all_visible(attention, loaded, kv_dtype, page_size)
    with refusing(loaded.architecture, "the start-up check", other_kernels(attention.kernel.name)):
        sample = sample_logits(whole, check_with, page_size, kv_dtype)
    wrong = differs(kept.sample, sample, kv_dtype=kv_dtype)
    if wrong:
        log.warning("the packed weights in %s are made again: %s", file, wrong)
        return None
    prove_kernel(attention, "cpu", loaded.dtype, kv_dtype, page_size)
    log.info("weights are %s, packed by an earlier start in %s", weights, file)
    return Prepared(loaded, "cpu", weights, kv_dtype, attention)


def _from_source(
    settings: Settings, page_size: int, folder: Path, file: Path | None, report: Report
) -> Prepared:
    """Read, recognize, lay out, prove, keep."""
    source = made_from(folder) if file is not None else {}
    loaded, device = load_as_set(settings, folder, report)
    report("checking", 0.88)
    attention = choose_attention(settings, page_size, loaded, device, cache_dtype(settings, loaded))
    failing = loaded.architecture, "the start-up check", other_kernels(attention.kernel.name)
    with refusing(*failing):
        own = compute_own(loaded, page_size)

    def proving(floats: LoadedModel) -> Proven:
        report("checking", 0.92)
        with refusing(*failing):
            return prove(floats, own, attention, page_size)

    report("recognizing the layers and packing the weights", 0.9)
    loaded, weights, proven = lay_out(loaded, settings.weights, proving)
    kv_dtype = cache_dtype(settings, loaded, weights)
    attention = choose_attention(settings, page_size, loaded, device, kv_dtype, weights)
    with refusing(*failing):
        check_served(
            loaded, proven, attention, page_size, kv_dtype, weights=weights, packed=is_packed(weights)
        )
        prove_kernel(attention, device, loaded.dtype, kv_dtype, page_size)
    if is_packed(weights) and device == "cpu":
        _keep(loaded, weights, source, file, report)
    return Prepared(loaded, device, weights, kv_dtype, attention)


def _keep(
    loaded: LoadedModel, weights: str, source: Mapping[str, Any], file: Path | None, report: Report
) -> None:
    if (reason := why_not_kept(loaded)) is not None:
        log.info("every start packs the weights of %s: %s", loaded.architecture, reason)
    elif file is None:
        log.info("every start packs the weights: --rope-scaling and --dtype change what would be kept")
    else:
        report("keeping the packed weights", 0.94)
        with refusing(loaded.architecture, "the start-up check"):
            sample = oracle_logits(loaded)
        keep(file, source, KeptModel(loaded, weights, loaded.context_length, sample))


def choose_attention(
    settings: Settings,
    page_size: int,
    loaded: LoadedModel,
    device: str,
    kv_dtype: torch.dtype,
    weights: str | None = None,
) -> Attention:
    """The attention that is to serve a model.

    Args:
        settings: of the server.
        page_size: tokens per page.
        loaded: the model.
        device: ``cpu`` or ``cuda``.
        kv_dtype: dtype of the KV cache.
        weights: as ``quantize`` says; ``None`` for attention of the strict proof, or where none are packed.

    Raises:
        RefusedError: no kernel computes it so; the sentence says why.
    """
    try:
        return resolve(
            settings.attention,
            settings.attention_option,
            settings.kernel,
            loaded.layers,
            torch.device(device),
            kv_dtype,
            page_size,
            # Packed layers round their own activations more coarsely.
            round_products=weights is not None and is_packed(weights),
        )
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error


def load_as_set(settings: Settings, folder: Path, report: Report) -> tuple[LoadedModel, str]:
    """The model as these settings want it, and the device that it is on: ``cpu`` or ``cuda``.

    Raises:
        RefusedError: the model can't be served so; the sentence says why.
    """
    # transformers takes seconds to import, and a packed model does without.
    from server.models.load import load_model

    device = chosen_device(settings)
    scaling = read_scaling(settings.rope_scaling, settings.rope_option)
    loaded = load_model(
        folder,
        settings.dtype,
        device,
        settings.max_context,
        report,
        reach=_reach(settings),
        scaling=scaling,
    )
    return loaded, device


def chosen_device(settings: Settings) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        RefusedError: a GPU was asked for, and there is none.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise RefusedError(
            "--device cuda: torch sees no CUDA device; use --device cpu or a CUDA build of torch"
        )
    return settings.device if settings.device != "auto" else "cuda" if available else "cpu"


def _reach(settings: Settings) -> int | None:
    try:
        return make_pattern(settings.attention, settings.attention_option).reach
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error


def cache_dtype(settings: Settings, loaded: LoadedModel, weights: str = "") -> torch.dtype:
    """Dtype of the KV cache; ``weights`` are as ``quantize`` says, or not packed yet."""
    if settings.kv_dtype != "auto":
        return CACHE_DTYPES[settings.kv_dtype]
    # On a GPU activations are not rounded, so that the cache's rounding would not be small beside theirs.
    rounded = is_packed(weights) and loaded.model.device.type == "cpu"
    return torch.float16 if rounded else loaded.dtype
