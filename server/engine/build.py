"""From settings and a model folder to an engine that runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from attention.cache import PagedCache
from attention.dtypes import dtype_name
from server.engine.core import EngineCore
from server.engine.cores import usable_cores
from server.engine.hardware import measure, memory_bytes, used_bytes
from server.engine.kv_events import kv_events
from server.engine.kv_manager import most_pages
from server.engine.prepare import Prepared, Report, chosen_device, prepare
from server.engine.runner import Runner
from server.engine.speculation.choose import make_drafter, refuse_speculation, told
from server.engine.speculation.draft_model import DraftModel, prepare_draft
from server.engine.team import watched
from server.errors import RefusedError
from server.messages import Measured, Ready
from server.models.executors.captured import CapturedExecutor
from server.models.executors.choose import captured, choose_executor
from server.models.loaded import LoadedModel
from server.models.memory import available_bytes
from server.models.refusing import refusing
from server.settings import Settings
from server.sizes import Sizes

log = logging.getLogger("longspan.engine")

# A shorter context is useless: --kv-memory was meant in another unit.
_LEAST_TOKENS = 256


def build_engine(
    settings: Settings,
    folder: Path,
    report: Report,
    preparing: Callable[[Settings, Path, Report], Prepared] = prepare,
    arrivals: int | None = None,
    tokenizer: Path | None = None,
) -> tuple[EngineCore, Ready]:
    """Loads the model, chooses its attention, checks the two together and allocates the KV cache.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        report: told what is going on, with the share done.
        preparing: loads the model and checks it: an encoder-decoder in another way than a decoder.
        arrivals: see ``EngineCore``.
        tokenizer: the same.

    Raises:
        RefusedError: the model, the settings and the machine don't go together; the sentence says why.
    """
    _refuse_memory(settings)
    refuse_speculation(settings, chosen_device(settings))
    sizes = Sizes.of(settings, chosen_device(settings))
    if sizes.max_batch_tokens < sizes.max_running:
        raise RefusedError(
            f"--max-batch-tokens {sizes.max_batch_tokens} must be at least "
            f"--max-running {sizes.max_running}: every running sequence needs a token per step"
        )
    threads = settings.threads or usable_cores()
    torch.set_num_threads(threads)
    prepared = preparing(settings, folder, report)
    loaded, device, weights = prepared.loaded, prepared.device, prepared.weights
    attention, kv_dtype = prepared.attention, prepared.kv_dtype
    draft = prepare_draft(settings, prepared, folder, sizes.page_size, report)

    measured = None
    if settings.measure_device:
        report("measuring the device", 0.94)
        measured = _measured(loaded)
    report("allocating the KV cache", 0.95)
    page_bytes = PagedCache.bytes_per_page(loaded.layers, sizes.page_size, kv_dtype, attention.pattern)
    page_bytes += 0 if draft is None else draft.page_bytes
    pages, context_length = _size_cache(settings, sizes, prepared, draft, page_bytes)
    cache = PagedCache(loaded.layers, pages, sizes.page_size, kv_dtype, device, pattern=attention.pattern)
    with refusing(loaded.architecture, "reading its rotation"):
        executor = choose_executor(loaded, attention, cache)
    seq2seq = prepared.encoder_decoder
    if seq2seq is not None:
        executor.reason += "" if device == "cpu" else "; decode steps are not captured"
    elif device == "cuda" and settings.cuda_graphs:
        report("capturing decode steps", 0.97)
        executor = captured(executor, most=sizes.max_running, context_length=context_length)
    elif device == "cuda":
        executor.reason += "; decode steps are not captured: --no-cuda-graphs"
    runner = Runner(executor)
    drafter = make_drafter(settings, runner, loaded, context_length, draft, sizes.max_batch_tokens)
    core = EngineCore(
        runner,
        context_length=context_length,
        source_length=0 if seq2seq is None else seq2seq.source_length,
        max_running=sizes.max_running,
        max_batch_tokens=sizes.max_batch_tokens,
        max_prefills=settings.max_prefills,
        prompt_step_seconds=settings.prompt_step_ms / 1000 or None,
        aging_seconds=settings.priority_aging_seconds or None,
        prefix_cache=settings.prefix_cache,
        ahead=device == "cuda",  # a CPU has computed a step when it is launched
        check_integrity=settings.check_integrity,
        team=watched(threads) if executor.thread_invariant else None,
        drafter=drafter,
        arrivals=arrivals,
        tokenizer=tokenizer,
    )
    events = kv_events(settings, settings.model_name or folder.name, sizes.page_size)
    if events is not None:
        core.kv.tell(events)
    ready = Ready(
        architecture=loaded.architecture,
        parameters=loaded.parameters,
        layers=len(loaded.layers),
        vocabulary_size=loaded.vocabulary_size,
        context_length=context_length if seq2seq is None else seq2seq.source_length + seq2seq.target_length,
        dtype=str(loaded.dtype).removeprefix("torch."),
        kv_dtype=dtype_name(kv_dtype),
        weights=weights,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        attention_backend=attention.backend,
        attention_pattern=attention.pattern.name,
        attention_kernel=attention.kernel.name,
        attention_reason=attention.reason,
        attention_options=dict(attention.options),
        page_size=sizes.page_size,
        kv_memory_share=sizes.kv_memory_share,
        max_batch_tokens=sizes.max_batch_tokens,
        max_running=sizes.max_running,
        pages_total=pages - 1,
        pages_per_sequence=core.kv.demand(context_length, sizes.max_batch_tokens),
        kv_bytes=pages * page_bytes,
        weight_bytes=core.costs.weights.stored + (0 if draft is None else draft.weight_bytes),
        memory_total=memory_bytes(runner.device),
        memory_used=used_bytes(runner.device),
        measured=measured,
        threads=threads,
        executor=executor.name,
        executor_reason=executor.reason,
        cuda_graphs=len(executor.sizes) if isinstance(executor, CapturedExecutor) else 0,
        speculation=told(settings, drafter, draft),
        versions={"torch": str(torch.__version__), "transformers": version("transformers")},
        encoder_decoder=seq2seq,
    )
    log.info(
        "attention %s, kernel %s (%s); %d pages of %d tokens in %s, %.2f GiB",
        ready.attention_backend,
        ready.attention_kernel,
        ready.attention_reason,
        ready.pages_total,
        ready.page_size,
        ready.kv_dtype,
        ready.kv_bytes / 2**30,
    )
    log.info("steps are computed by executor %s: %s", ready.executor, ready.executor_reason)
    return core, ready


def _refuse_memory(settings: Settings) -> None:
    """Refuses what no loading can change: more memory for the KV cache than the device has.

    Raises:
        RefusedError: it is more.
    """
    if settings.kv_memory is None:
        return
    device = chosen_device(settings)
    if settings.kv_memory > (total := memory_bytes(torch.device(device))):
        owner = "this machine" if device == "cpu" else "the GPU"
        raise RefusedError(
            f"--kv-memory {settings.kv_memory / 2**30:.1f}GiB is more than the {total / 2**30:.1f} GiB that "
            f"{owner} has; lower it, or leave it out for a share of what is free (--kv-memory-share)"
        )


def _measured(loaded: LoadedModel) -> Measured | None:
    """The device's bandwidth and matrix rate; where they can't be measured, a warning says why."""
    try:
        return measure(loaded.model)
    except RuntimeError as error:  # a server without these figures is better than none
        log.warning("the device's bandwidth and matrix rate were not measured: %s", error)
        return None


def _size_cache(
    settings: Settings,
    sizes: Sizes,
    prepared: Prepared,
    draft: DraftModel | None,
    page_bytes: int,
) -> tuple[int, int]:
    """Number of pages, page 0 included, and the context length that they allow."""
    loaded, expired = prepared.loaded, prepared.attention.expired
    if settings.kv_memory is not None:
        budget = settings.kv_memory
    else:
        # Useful at most: every running sequence at its longest, and as much again for the prefix cache.
        useful = 2 * sizes.max_running * loaded.context_length * page_bytes // sizes.page_size
        mapped = loaded.mapped_bytes + (0 if draft is None else draft.prepared.loaded.mapped_bytes)
        free = available_bytes(prepared.device) - mapped
        budget = min(int(free * sizes.kv_memory_share), useful)
    pages = budget // page_bytes
    needed = most_pages(loaded.context_length, sizes.max_batch_tokens, sizes.page_size, expired)
    if needed < pages:
        return pages, loaded.context_length
    capacity = max(0, pages - 1) * sizes.page_size  # page 0 is reserved
    if capacity < (least := min(_LEAST_TOKENS, loaded.context_length)):
        enough = (-(-least // sizes.page_size) + 1) * page_bytes
        raise RefusedError(
            f"{budget / 2**10:,.0f} KiB of KV cache hold {capacity} tokens, and a server needs room "
            f"for {least}, which takes {enough / 2**10:,.0f} KiB; raise --kv-memory"
        )
    if settings.max_context is not None or loaded.halves is not None:
        raise RefusedError(
            f"a context of {loaded.context_length} tokens needs {needed * page_bytes / 2**20:.0f} MiB of KV "
            f"cache, but only {budget / 2**20:.0f} MiB may be used; raise --kv-memory or lower --max-context"
        )
    log.warning(
        "the KV cache holds %d tokens, so the context is shortened from %d; raise --kv-memory for more",
        capacity,
        loaded.context_length,
    )
    return pages, capacity
