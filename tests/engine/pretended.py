"""Requests to a scheduler, and steps of a pretended model that always says 7."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.engine.scheduler import Scheduler
from server.messages import Sampling, Submit


def ask(
    scheduler: Scheduler, name: int, tokens: int, max_tokens: int = 4, prefix: Sequence[int] = (), **more: Any
) -> None:
    """Queues a prompt of ``tokens`` tokens that shares only ``prefix`` with others."""
    prompt = [*prefix, *(name * 10_007 + i for i in range(tokens - len(prefix)))]
    scheduler.add(Submit(id=name, prompt=prompt, sampling=Sampling(), max_tokens=max_tokens, **more))


def step(scheduler: Scheduler) -> dict[int, int]:
    """One step; tokens computed, by name."""
    scheduled = scheduler.schedule()
    for sequence, tokens in scheduled:
        scheduler.kv.advance(sequence, tokens)
        if sequence.remaining == 0:
            scheduler.kv.append(sequence, 7)
            if sequence.output_len == sequence.request.max_tokens:
                scheduler.remove(sequence.id)
    return {sequence.id: tokens for sequence, tokens in scheduled}
