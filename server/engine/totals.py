"""An engine's counts over its steps, and its load after each."""

from __future__ import annotations

import time

import torch

from attention.reading import Pages
from server.engine.costs import Cost
from server.engine.hardware import MemoryMeter
from server.engine.scheduler import Scheduler
from server.messages import Stats


class Totals:
    """Counts since the engine started.

    Args:
        device: where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = MemoryMeter(device)
        self._pages_read = self._pages_skipped = 0
        self._drafted = self._accepted = 0

    def read(self, pages: Pages) -> None:
        """Counts the pages of a step."""
        self._pages_read += pages.read
        self._pages_skipped += pages.skipped

    def drafted(self, tokens: int, accepted: int) -> None:
        """Counts tokens that were drafted, and those of them that were output."""
        self._drafted += tokens
        self._accepted += accepted

    def stats(
        self, scheduler: Scheduler, prompt_tokens: int, decode_tokens: int, seconds: float, cost: Cost
    ) -> Stats:
        """The load now, with the figures of the step that led to it."""
        kv = scheduler.kv
        return Stats(
            running=sum(len(sequence.parts) for sequence in scheduler.running),
            waiting=scheduler.waiting.sequences,
            pages_total=kv.pool.total,
            pages_used=kv.pool.held,
            pages_cached=kv.pool.cached,
            preemptions=scheduler.preemptions,
            prefix_queries=kv.prefix_queries,
            prefix_hits=kv.prefix_hits,
            draft_tokens=self._drafted,
            accepted_draft_tokens=self._accepted,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            step_seconds=seconds,
            pages_read=self._pages_read,
            pages_skipped=self._pages_skipped,
            bytes_moved=cost.bytes,
            flops=cost.flops,
            memory_used=self._memory.used(time.monotonic()),
            threads=torch.get_num_threads(),
        )
