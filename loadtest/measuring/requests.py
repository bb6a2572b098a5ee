"""Sends the requests of one cell and times their streams.

From this very process, in one event loop: starting client processes takes a second, many times what a cell
does, and on a small machine they would compete with each other. One loop takes in thousands of messages in a
second; for loads that need more than that, there is ``longspan load`` with its client processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence

from loadtest.greedy import GREEDY
from loadtest.measuring.records import Record
from loadtest.measuring.types import CannotMeasureError
from longspan import AsyncClient, AsyncStream, DeadlineError, LongspanError, Prompt


async def closed_loop(
    client: AsyncClient, prompts: Sequence[Sequence[int]], output_tokens: int, users: int
) -> list[Record]:
    """Measures ``users`` users, each sending its next prompt when the last one is answered.

    Args:
        client: of the server.
        prompts: token ids; user ``u`` sends those whose place leaves ``u`` when divided by ``users``.
        output_tokens: of each, exactly.
        users: at once.

    Raises:
        LongspanError: a request failed.
        CannotMeasureError: an answer had another length.
    """
    records: list[Record] = []

    async def user(mine: Iterator[tuple[int, Sequence[int]]]) -> None:
        for place, prompt in mine:
            now = time.monotonic()
            record = Record(place, 0, now, now, expected_tokens=output_tokens)
            records.append(record)
            await _send_exactly(client, prompt, record)

    numbered = list(enumerate(prompts))
    await _all([user(iter(numbered[number::users])) for number in range(users)])
    return records


async def open_loop(
    client: AsyncClient, prompts: Sequence[Sequence[int]], output_tokens: int, begins: Sequence[float]
) -> list[Record]:
    """Sends each prompt at its time, independent of the server.

    Args:
        client: of the server.
        prompts: token ids.
        output_tokens: of each, exactly.
        begins: seconds after the start, one per prompt.

    Raises:
        LongspanError: a request failed.
        CannotMeasureError: an answer had another length.
    """
    records: list[Record] = []
    start = time.monotonic()

    async def at(place: int, prompt: Sequence[int], begin: float) -> None:
        await sleep_until(start + begin)
        record = Record(place, 0, start + begin, time.monotonic(), expected_tokens=output_tokens)
        records.append(record)
        await _send_exactly(client, prompt, record)

    await _all([at(place, *pair) for place, pair in enumerate(zip(prompts, begins, strict=True))])
    return records


async def send(client: AsyncClient, prompt: Prompt, record: Record) -> str:
    """Sends one greedy request of ``record.expected_tokens``, times its stream, and gives its text.

    Args:
        client: of the server.
        prompt: as the client takes it.
        record: filled in, also where the request fails.

    Raises:
        LongspanError: it failed.
    """
    parts = []
    stream: AsyncStream | None = None
    record.sent = time.monotonic()
    try:
        # It may fail by itself: no message can hold some prompts.
        stream = client.stream(prompt, max_tokens=record.expected_tokens, ignore_eos=True, **GREEDY)
        record.sent = time.monotonic()
        async with stream:
            async for delta in stream:
                if count := len(delta.token_ids):
                    record.arrivals.append((time.monotonic(), count))
                parts.append(delta.text)
    finally:
        record.ended = time.monotonic()
        if stream is not None:
            record.prompt_tokens, record.cached_tokens = stream.prompt_tokens, stream.cached_prompt_tokens
    return "".join(parts)


async def sleep_until(when: float) -> None:
    """Sleeps until this monotonic time; the loop's timers count whole milliseconds and may end early."""
    while (left := when - time.monotonic()) > 0:  # noqa: ASYNC110 (it is the time that is waited for)
        await asyncio.sleep(left)


def reason(error: LongspanError) -> str:
    """Why a server that is measured has failed, in words for the operator."""
    if isinstance(error, DeadlineError):
        return "its server hangs: a request was not answered in many times the time that such a one takes"
    return str(error) or type(error).__name__


async def _all(work: Sequence[Coroutine[None, None, None]]) -> None:
    """Does it all at once; the first failure ends the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except* (LongspanError, CannotMeasureError) as failures:
        raise failures.exceptions[0] from None


async def _send_exactly(client: AsyncClient, prompt: Sequence[int], record: Record) -> None:
    await send(client, prompt, record)
    if record.tokens != record.expected_tokens:
        raise CannotMeasureError(
            f"the server answered {record.tokens} tokens where {record.expected_tokens} were asked for"
        )
