"""From settings and a model folder to an engine that runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers

from attention.backends import Attention, UnsupportedError, make_pattern, resolve
from attention.patterns.full import Full
from attention.types import PagedCache
from server.engine.core import EngineCore
from server.engine.kv_manager import most_pages
from server.engine.runner import Runner
from server.engine.types import Ready, RefusedError
from server.models.check import packed_check, sample_logits, self_check
from server.models.load import LoadedModel, load_model
from server.models.memory import available_bytes
from server.models.quantize import quantize
from server.models.rope import read_scaling
from server.settings import Settings

log = logging.getLogger("longspan.engine")

Report = Callable[[str, float], None]


def build_engine(settings: Settings, folder: Path, report: Report) -> tuple[EngineCore, Ready]:
    """Loads the model, chooses its attention, checks the two together and allocates the KV cache.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        report: told what is going on, with the share done.

    Raises:
        RefusedError: the model, the settings and the machine don't go together; the sentence says why.
    """
    if settings.max_batch_tokens < settings.max_running:
        raise RefusedError(
            f"--max-batch-tokens {settings.max_batch_tokens} must be at least "
            f"--max-running {settings.max_running}: every running sequence needs a token per step"
        )
    threads = settings.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    loaded, device = load_as_set(settings, folder, report)
    report("checking", 0.9)
    choose = partial(
        resolve,
        layers=loaded.layers,
        device=torch.device(device),
        dtype=loaded.dtype,
        page_size=settings.page_size,
    )
    try:
        attention = choose(settings.attention, settings.attention_option, settings.kernel)
        # What a pattern hides would be taken for a fault: the check is of the model and the kernel.
        check_with = replace(attention, backend="full", pattern=Full(), family=False)
        place = torch.device(device), loaded.dtype, settings.page_size
        if attention.kernel.unsupported(loaded.layers, *place, check_with.pattern):
            check_with = choose("full", {}, "auto")  # the kernel is for its own pattern alone
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error
    self_check(loaded, check_with, settings.page_size)
    before = sample_logits(loaded, check_with, settings.page_size)
    report("packing the weights", 0.93)
    weights = quantize(loaded.model, settings.weights)
    packed_check(before, sample_logits(loaded, check_with, settings.page_size), weights)

    report("allocating the KV cache", 0.95)
    page_bytes = PagedCache.bytes_per_page(loaded.layers, settings.page_size, loaded.dtype, attention.pattern)
    pages, context_length = _size_cache(settings, loaded, attention, device, page_bytes)
    cache = PagedCache(
        loaded.layers, pages, settings.page_size, loaded.dtype, device, pattern=attention.pattern
    )
    try:
        runner = Runner(loaded.model, loaded.layers, attention, cache, loaded.rope)
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error
    core = EngineCore(
        runner,
        context_length=context_length,
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
        prefix_cache=settings.prefix_cache,
        check_integrity=settings.check_integrity,
    )
    ready = Ready(
        architecture=loaded.architecture,
        parameters=loaded.parameters,
        layers=len(loaded.layers),
        vocabulary_size=loaded.vocabulary_size,
        context_length=context_length,
        dtype=str(loaded.dtype).removeprefix("torch."),
        weights=weights,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        attention_backend=attention.backend,
        attention_pattern=attention.pattern.name,
        attention_kernel=attention.kernel.name,
        attention_reason=attention.reason,
        attention_options=dict(attention.options),
        page_size=settings.page_size,
        pages_total=pages - 1,
        kv_bytes=pages * page_bytes,
        threads=threads,
        versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
    )
    log.info(
        "attention %s, kernel %s (%s); %d pages of %d tokens, %.2f GiB",
        ready.attention_backend,
        ready.attention_kernel,
        ready.attention_reason,
        ready.pages_total,
        ready.page_size,
        ready.kv_bytes / 2**30,
    )
    return core, ready


def load_as_set(settings: Settings, folder: Path, report: Report) -> tuple[LoadedModel, str]:
    """The model as these settings want it, and the device that it is on: ``cpu`` or ``cuda``.

    Raises:
        RefusedError: the model can't be served so; the sentence says why.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise RefusedError(
            "--device cuda: torch sees no CUDA device; use --device cpu or a CUDA build of torch"
        )
    scaling = read_scaling(settings.rope_scaling, settings.rope_option)
    try:
        reach = make_pattern(settings.attention, settings.attention_option).reach
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error
    loaded = load_model(
        folder, settings.dtype, device, settings.max_context, report, reach=reach, scaling=scaling
    )
    return loaded, device


def _size_cache(
    settings: Settings, loaded: LoadedModel, attention: Attention, device: str, page_bytes: int
) -> tuple[int, int]:
    """Number of pages, page 0 included, and the context length that they allow."""
    if settings.kv_memory is not None:
        budget = settings.kv_memory
    else:
        # More than every running sequence at its longest, twice over for the prefix cache, is of no use.
        useful = 2 * settings.max_running * loaded.context_length * page_bytes // settings.page_size
        budget = min(int(available_bytes(device) * settings.kv_memory_share), useful)
    pages = budget // page_bytes
    if pages < 2:
        raise RefusedError(
            f"{budget / 2**20:.1f} MiB of KV cache hold not even one page of {settings.page_size} tokens "
            f"({page_bytes / 2**20:.2f} MiB) beside the reserved one; raise --kv-memory or lower --page-size"
        )
    needed = most_pages(
        loaded.context_length, settings.max_batch_tokens, settings.page_size, attention.expired
    )
    if needed < pages:
        return pages, loaded.context_length
    capacity = (pages - 1) * settings.page_size
    if settings.max_context is not None:
        raise RefusedError(
            f"--max-context {settings.max_context} needs {needed * page_bytes / 2**20:.0f} MiB of KV cache, "
            f"but only {budget / 2**20:.0f} MiB may be used; raise --kv-memory or lower --max-context"
        )
    log.warning(
        "the KV cache holds %d tokens, so the context is shortened from %d; raise --kv-memory for more",
        capacity,
        loaded.context_length,
    )
    return pages, capacity
