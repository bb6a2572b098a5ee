"""Measures what a replica's steps and messages cost on this machine.

Steps are timed in an engine called directly, first with nothing beside it, then beside a second one that does
the same. The rest is processor time of the processes of a real server and its client, under three loads.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import statistics
import urllib.request
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from loadtest import document
from loadtest.direct.scale.costs import Costs, Limits, LoopCost, StepCost, Work, least_squares
from loadtest.direct.scale.served import Used, closed
from loadtest.servers import Address, serve

_PROMPT = 16
_LOADS = ((1, 6, 96), (8, 64, 64), (8, 200, 1))  # users, requests, output tokens
_DECODES = ((64, 1), (64, 4), (64, 16), (512, 1), (512, 8), (2048, 1), (2048, 4), (6000, 1))
_PREFILLS = ((0, 16), (0, 64), (0, 256), (512, 32), (512, 128), (2048, 32), (2048, 128), (6000, 128))
_REPEATS = 5
_PATIENCE = 180.0

Measured = list[tuple[Work, float]]


class CalibrationError(RuntimeError):
    """An engine can't be timed; the message says why."""


def calibrate(arguments: Sequence[str]) -> Costs:
    """All costs, in about a minute.

    Args:
        arguments: of ``longspan serve``.

    Raises:
        CalibrationError: the engine did not start or stopped.
        loadtest.servers.NotStartedError: the server did not start.
        longspan.LongspanError: a request failed.
    """
    limits, alone, both = _steps(arguments)
    step = StepCost.fit(alone)
    beside = min(1.0, statistics.median(one / two for (_, one), (_, two) in zip(alone, both, strict=True)))
    with serve(*arguments) as address:
        runs = [_run(address, *load, limits.vocabulary) for load in _LOADS]
    alone_ = [run.alone(beside) for run in runs]
    rest = [used.engine - step.of(run.work) for used, run in zip(alone_, runs, strict=True)]
    counts = [run.counts for run in runs]

    def fit(seconds: Sequence[float], scale: Sequence[float]) -> LoopCost:
        return LoopCost(*least_squares(counts, seconds, scale))

    return Costs(
        step=step,
        engine=fit(rest, [used.engine for used in alone_]),
        server=fit([used.server for used in alone_], [used.server for used in alone_]),
        client=fit([used.client for used in alone_], [used.client for used in alone_]),
        cores=len(os.sched_getaffinity(0)),
        beside=beside,
        limits=limits,
        machine=document.cores_of(document.machine()),
    )


class _Run(NamedTuple):
    """A load on a server: what it was, and what it took."""

    steps: int
    requests: int
    output_tokens: int
    used: Used
    seconds: float

    @property
    def counts(self) -> tuple[int, int, int]:
        """Requests, messages of steps, tokens."""
        return self.requests, self.steps, self.requests * self.output_tokens

    @property
    def work(self) -> Work:
        """Of all steps; a request's first token comes of its prompt's step."""
        decodes = self.output_tokens - 1
        context = decodes * (2 * _PROMPT + decodes - 1) // 2
        each = (decodes, context, _PROMPT, _PROMPT**2 // 2)
        return Work(self.steps, *(self.requests * count for count in each))

    def alone(self, beside: float) -> Used:
        """Processor time, less what each process's was longer for the others that computed beside it."""
        total = sum(self.used)
        return Used(*(own * (1 - (1 - beside) * min(1.0, (total - own) / self.seconds)) for own in self.used))


def _run(address: Address, users: int, requests: int, output_tokens: int, vocabulary: int) -> _Run:
    rng, ids = random.Random(0), range(min(1000, vocabulary // 2), vocabulary)
    prompts = [rng.choices(ids, k=_PROMPT) for _ in range(1 + requests)]
    before, steps = Used.now(address.pid), _count_steps(address)
    seconds = closed(address, prompts, output_tokens, users)
    used, requests = Used.now(address.pid).since(before), requests + 1
    return _Run(_count_steps(address) - steps, requests, output_tokens, used, seconds)


def _count_steps(address: Address) -> int:
    with urllib.request.urlopen(address.metrics_url, timeout=30) as response:
        text = response.read().decode()
    found = re.findall(r"^longspan_engine_step_duration_seconds_count\{.*\} (\S+)$", text, re.MULTILINE)
    return int(sum(map(float, found)))


def _steps(arguments: Sequence[str]) -> tuple[Limits, Measured, Measured]:
    """The engine's sizes, and the seconds of steps alone and beside a second engine."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes, ends = [], []
    try:
        for first in (True, False):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_time, args=(arguments, first, barrier, there), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            ends.append(here)
        found: list[Any] = [end.recv() for end in ends]
    except EOFError:
        raise CalibrationError("an engine that was timed has ended; it has said why") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found[0]


def _time(arguments: Sequence[str], first: bool, barrier: Any, end: Connection) -> None:
    """One of two processes: both open an engine, the first times it, then both do."""
    from loadtest.direct.engine import open_engine  # the parent needs no torch
    from loadtest.direct.settings import read_settings
    from server.engine.pace import EXPECTED_REACH
    from server.models.resolve import resolve_model

    settings = read_settings(arguments)
    files = resolve_model(settings.model, settings.cache_dir, lambda stage, share: None)
    with open_engine(settings, files.folder) as engine:
        core, scheduler = engine.core, engine.core.scheduler
        barrier.wait(_PATIENCE)
        alone = _grid(engine) if first else []
        barrier.wait(_PATIENCE)
        both = _grid(engine)
        limits = Limits(
            pages=core.kv.pool.pages,
            page_size=core.kv.page_size,
            max_running=scheduler.max_running,
            max_batch_tokens=scheduler.max_batch_tokens,
            max_prefills=settings.max_prefills,
            prompt_step_seconds=settings.prompt_step_ms / 1000,
            reach=core.costs.reach or EXPECTED_REACH,
            aging=settings.priority_aging_seconds,
            gives_up=core.runner.executor.gives_up,
            context_length=core.context_length,
            vocabulary=engine.ready.vocabulary_size,
        )
        end.send((limits, alone, both))


def _grid(engine: Any) -> Measured:
    """Median seconds of steps of known work, as far as the model's context reaches."""
    found, most = [], engine.core.context_length - 256
    for context, streams in _DECODES:
        if context <= most:
            seconds = engine.decode_times(context, streams, _REPEATS)
            found.append((Work.of([(context, 1)] * streams), statistics.median(seconds)))
    for context, tokens in _PREFILLS:
        if context <= most:
            seconds = engine.prefill_times(context, tokens, _REPEATS)
            found.append((Work.of([(context, tokens)]), statistics.median(seconds)))
    return found
