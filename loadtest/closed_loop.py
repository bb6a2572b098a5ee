"""A fixed number of clients, each sending its next request when the last has ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

from loadtest.measures import Record
from longspan import AsyncClient, LongspanError


def random_prompts(seed: int, tokens: int, vocabulary: int) -> Iterator[list[int]]:
    """Prompts of exactly ``tokens`` random token ids, without end; no two share a prefix worth caching."""
    rng = random.Random(seed)
    # The lowest ids are special tokens in most vocabularies.
    low = min(1000, vocabulary // 2)
    while True:
        yield [rng.randrange(low, vocabulary) for _ in range(tokens)]


async def request(client: AsyncClient, prompt: list[int], output_tokens: int) -> Record:
    """Sends one greedy request of exactly ``output_tokens`` output tokens and times its stream."""
    record = Record(sent=time.monotonic())
    stream = client.stream(prompt, max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    try:
        async for delta in stream:
            if delta.token_ids:
                record.arrivals.append((time.monotonic(), len(delta.token_ids)))
    except LongspanError as error:
        record.error = str(error)
    record.ended = time.monotonic()
    record.prompt_tokens = stream.prompt_tokens
    if not record.error and record.tokens != output_tokens:
        record.error = f"got {record.tokens} tokens instead of {output_tokens}"
    return record


async def closed_loop(
    host: str,
    port: int,
    *,
    concurrency: int,
    requests: int,
    prompts: Iterator[list[int]],
    output_tokens: int,
) -> list[Record]:
    """Runs ``requests`` requests, ``concurrency`` of them at any time.

    Args:
        host: of the server.
        port: its gRPC port.
        concurrency: clients.
        requests: in all.
        prompts: where the prompts come from.
        output_tokens: of each request, exactly.

    Returns:
        One record per request, in the order in which they ended.
    """
    records: list[Record] = []
    left = iter(range(requests))

    async with AsyncClient(host, port) as client:

        async def loop() -> None:
            for _ in left:
                record = await request(client, next(prompts), output_tokens)
                records.append(record)

        await asyncio.gather(*(loop() for _ in range(concurrency)))
    return records
