"""The engine's side of ``loadtest.direct.growth``. Each function runs in a process of its own."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from attention.backends import UnsupportedError, resolve
from attention.cache import PagedCache
from attention.dtypes import dtype_name
from attention.survey import survey as survey_backends
from loadtest import document
from loadtest.deployment import FULL, Deployment, parse
from loadtest.direct.engine import DirectEngine, open_engine
from loadtest.direct.growth.types import Plan, Point, Survey, Variant
from loadtest.direct.room import RoomError, placed_tokens
from loadtest.direct.settings import read_settings
from server.engine.kv_manager import most_pages
from server.engine.prepare import Prepared, prepare
from server.errors import RefusedError
from server.models.loaded import LoadedModel
from server.models.memory import available_bytes
from server.models.resolve import resolve_model
from server.models.rope import RopeScaling, apply_scaling
from server.settings import Settings
from server.sizes import Sizes

Told = Iterator[tuple[str, float | str]]

_FACTOR_PARTS = 8


def survey(plan: Plan) -> Told:
    """Tells ``survey``, a ``Survey`` as JSON: which variants work with this model here, and what makes them.

    Raises:
        RefusedError: the model can't be served even with full attention; the sentence says why.
    """
    settings = read_settings(plan.arguments)
    pickles = settings.allow_pickle
    files = resolve_model(settings.model, settings.cache_dir, _silent, pickles=pickles)
    plain = {"attention": FULL.attention, "attention_option": {}, "kernel": "auto"}
    prepared = prepare(settings.model_copy(update=plain), files.folder, _silent)
    loaded, on_cuda = prepared.loaded, prepared.device == "cuda"
    contexts, extended, notes = _contexts(plan, settings, files.folder, loaded)
    sizes = Sizes.of(settings, prepared.device)
    running = max(sizes.max_running, *plan.streams)
    batch = max(sizes.max_batch_tokens, running)
    shared = ("--max-running", str(running), "--max-batch-tokens", str(batch), *extended, *plan.arguments)
    works = [
        (placed_tokens(point.context, plan.steps), point.streams)
        for point in plan.points
        if point.context in contexts
    ]
    variants = tuple(
        _variant(deployment, settings, prepared, shared, works, batch)
        for deployment in _deployments(plan, settings, prepared)
    )
    model = {
        "name": settings.model_name or files.name,
        "architecture": loaded.architecture,
        "parameters": loaded.parameters,
        "layers": len(loaded.layers),
        "context_length": loaded.context_length,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "weights": prepared.weights,
        "kv_dtype": dtype_name(prepared.kv_dtype),
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
    }
    versions = document.versions("longspan", "torch", "transformers")
    found = Survey(model, versions, str(files.folder), variants, tuple(notes), tuple(contexts))
    yield "survey", msgspec.json.encode(found).decode()


def ready(variant: Variant, folder: str) -> Told:
    """Opens the variant's engine, which then belongs to this process.

    Raises:
        RefusedError: the variant can't be served; the sentence says why.
    """
    _engine(variant.arguments, folder)
    yield from ()


def decode(variant: Variant, folder: str, point: Point, steps: int, seed: int) -> Told:
    """Tells ``tpot``, the median of the steps, ``pages_read`` and ``pages_held``; see ``Decode``.

    Or ``no room``, a sentence, if the point does not fit.
    """
    try:
        found = _engine(variant.arguments, folder).decode(point.context, point.streams, steps, seed)
    except RoomError as error:
        yield "no room", str(error)
        return
    yield "tpot", statistics.median(found.seconds)
    yield "pages_read", found.pages_read
    yield "pages_held", found.pages_held


@functools.cache
def _engine(arguments: tuple[str, ...], folder: str) -> DirectEngine:
    return open_engine(read_settings(arguments), Path(folder))


def _contexts(
    plan: Plan, settings: Settings, folder: Path, loaded: LoadedModel
) -> tuple[list[int], tuple[str, ...], list[str]]:
    """The contexts that can be served, the arguments for that, and sentences about it."""
    asked, own = list(plan.contexts), loaded.context_length
    if settings.max_context is not None:
        return asked, (), []
    longest = placed_tokens(asked[-1], plan.steps)
    arguments: tuple[str, ...] = ("--max-context", str(longest))
    if longest <= own or settings.rope_scaling is not None:
        return asked, arguments, []
    from server.models.recognize import read_config  # transformers takes seconds to import

    try:
        trained = apply_scaling(read_config(folder), RopeScaling("yarn", {"factor": 1.0}))
    except RefusedError as error:
        fitting = [context for context in asked if placed_tokens(context, plan.steps) <= own]
        if not fitting:
            raise
        arguments = ("--max-context", str(placed_tokens(fitting[-1], plan.steps)))
        return fitting, arguments, [f"contexts beyond the model's own {own} tokens are left out: {error}"]
    # A part of a power of two, so that it and the whole number of positions agree.
    factor = math.ceil(_FACTOR_PARTS * longest / trained) / _FACTOR_PARTS
    arguments = ("--rope-scaling", "yarn", "--rope-option", f"factor={factor:g}", *arguments)
    note = (
        f"the model is made for {own} tokens; its rotary positions are stretched throughout "
        f"({' '.join(arguments)}), which tells nothing of its answers there"
    )
    return asked, arguments, [note]


def _deployments(plan: Plan, settings: Settings, prepared: Prepared) -> list[Deployment]:
    """Full attention, then those asked for, or every backend and every pattern of a family."""
    if plan.backends:
        asked = [parse(text) for text in plan.backends]
    else:
        layers, kv_dtype = prepared.loaded.layers, prepared.kv_dtype
        asked = []
        for verdict in survey_backends(
            layers, prepared.device, kv_dtype, Sizes.of(settings, prepared.device).page_size
        ):
            pattern = verdict.options.get("pattern")
            options = {} if pattern is None else {"pattern": pattern}
            asked.append(Deployment(pattern or verdict.backend, verdict.backend, options))
    return list({deployment.name: deployment for deployment in [FULL, *asked]}.values())


def _variant(
    deployment: Deployment,
    settings: Settings,
    prepared: Prepared,
    shared: tuple[str, ...],
    works: list[tuple[int, int]],
    batch: int,
) -> Variant:
    """The deployment with a KV cache in which all work has room, or why it cannot be had.

    Args:
        deployment: a backend with its options.
        settings: of the model.
        prepared: the model.
        shared: arguments for all deployments.
        works: tokens of a sequence, and how many such there are at once.
        batch: tokens of a step, at most.
    """
    name, arguments = deployment.name, (*shared, *deployment.arguments)
    layers, kv_dtype = prepared.loaded.layers, prepared.kv_dtype
    page_size = Sizes.of(settings, prepared.device).page_size
    try:
        attention = resolve(
            deployment.attention,
            deployment.options,
            settings.kernel,
            layers,
            prepared.device,
            kv_dtype,
            page_size,
        )
    except UnsupportedError as error:
        return Variant(name, dict(deployment.options), "", str(error), arguments)
    options, kernel = dict(attention.options), attention.kernel.name
    if settings.kv_memory is not None:
        return Variant(name, options, kernel, None, arguments)
    held = [streams * (most_pages(each, batch, page_size, attention.expired) + 1) for each, streams in works]
    needed = (max(held) + 1) * PagedCache.bytes_per_page(layers, page_size, kv_dtype, attention.pattern)
    free = available_bytes(prepared.device)
    refusal = None
    if needed > free:
        refusal = (
            f"its KV cache would take {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of "
            f"{prepared.device} are free; give shorter --contexts or fewer --streams"
        )
    return Variant(name, options, kernel, refusal, ("--kv-memory", str(needed), *arguments))


def _silent(*_: Any) -> None:
    pass
