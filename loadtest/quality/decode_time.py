"""How long an output token takes, by the length of what came before it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from loadtest.greedy import GREEDY
from loadtest.quality.types import DecodeTime
from longspan import Client


def decode_times(
    client: Client, ids: Sequence[int], contexts: Sequence[int], output_tokens: int
) -> list[DecodeTime]:
    """Time per output token of one stream at each length.

    Args:
        client: of the server, which should do nothing else.
        ids: token ids, at least as many as the longest context; each prompt is their beginning, so that a
            server with a prefix cache computes each of them only once.
        contexts: prompt lengths in tokens.
        output_tokens: of each stream; at least 2.

    Raises:
        ValueError: there are too few ids or output tokens.
        LongspanError: the server cannot take such a prompt.
    """
    if len(ids) < max(contexts) or output_tokens < 2:
        raise ValueError(f"needs {max(contexts)} ids and 2 output tokens, not {len(ids)} and {output_tokens}")
    return [DecodeTime(context, _gap(client, ids[:context], output_tokens)) for context in sorted(contexts)]


def _gap(client: Client, prompt: Sequence[int], output_tokens: int) -> float:
    """Median time between tokens, in seconds; a mean would take in what a machine does now and then."""
    gaps, last = [], None
    for delta in client.stream(prompt, max_tokens=output_tokens, ignore_eos=True, **GREEDY):
        now = time.monotonic()
        if delta.token_ids:
            if last is not None:
                gaps.append((now - last) / len(delta.token_ids))
            last = now
    return statistics.median(gaps)
