"""Whether an engine has room for sequences that are to run all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.engine.core import EngineCore
from server.messages import Ready


class RoomError(ValueError):
    """The engine has no room for what was asked of it; the sentence says which setting would give it."""


def placed_tokens(context: int, steps: int) -> int:
    """Tokens for which a sequence needs room, so that it doesn't end while ``decode`` times its steps."""
    return context + steps + 2


def check_room(core: EngineCore, ready: Ready, totals: Sequence[int]) -> None:
    """Refuses sequences that would not run all at once.

    Args:
        core: the engine.
        ready: what it says of itself.
        totals: tokens of each sequence, output included.

    Raises:
        RoomError: they are too many, too long, or need more pages than there are.
    """
    if len(totals) > core.scheduler.max_running:
        raise RoomError(
            f"{len(totals)} sequences are more than --max-running {core.scheduler.max_running}; raise it"
        )
    longest = max(totals)
    if longest > core.context_length:
        raise RoomError(
            f"{longest} tokens are more than the context of {core.context_length}; raise --max-context"
        )
    # The scheduler keeps a page for each sequence that runs already.
    needed = sum(core.kv.demand(total, core.scheduler.max_batch_tokens) for total in totals)
    needed += len(totals) - 1
    if needed > core.kv.pool.total:
        mebibytes = (needed + 1) * ready.kv_bytes / (ready.pages_total + 1) / 2**20
        raise RoomError(
            f"{len(totals)} sequences of up to {longest} tokens need {needed} pages, but the KV cache "
            f"has {core.kv.pool.total}; raise --kv-memory to {math.ceil(mebibytes)}MiB"
        )
