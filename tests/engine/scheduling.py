"""A scheduler's requests, and its steps of a pretended model."""

from __future__ import annotations

from server.engine.scheduler import Scheduler
from server.messages import Sampling, Submit


def ask(scheduler: Scheduler, name: int, tokens: int = 20, max_tokens: int = 4, **more: int) -> None:
    """Adds a request whose prompt has nothing in common with others'."""
    prompt = [name * 10_007 + i for i in range(tokens)]
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
    scheduler.check_integrity()
    return {sequence.id: tokens for sequence, tokens in scheduled}
