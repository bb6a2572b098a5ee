"""``python -m loadtest.load.fairness``: how long requests wait beside long prompts.

Starts a server of its own without a prefix cache, and measures with random prompts, on the same cores: times
to the first token of short prompts by themselves, beside one long prompt and beside four, which are sent
again and again; of the first request after a second in which none came; of the long prompt by itself and
beside a stream; and the seconds between that stream's tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from loadtest.arguments import count
from loadtest.columns import Columns, figure
from loadtest.load.measures import percentile
from loadtest.servers import Address, NotStartedError, serve
from longspan import AsyncClient, LongspanError

SHORT = (16, 64, 128)
"""Tokens of short prompts."""

LONG = 8000
"""Tokens of a long prompt, where the context allows it."""

_PAUSE = 0.3  # seconds between two short requests, in the mean
_QUIET = 1.3  # seconds without a request after which a server may take longer steps
_WARM = 0.5  # seconds for which long prompts run before anything is measured beside them


@dataclass(slots=True)
class Waits:
    """Seconds that requests waited.

    Attributes:
        short: until the first token of a short prompt, by what runs beside it and its tokens.
        after_quiet: until the first token of the shortest prompt, beside a long one, after a quiet second.
        long: until the first token of a long prompt, by what runs beside it.
        gaps: between two tokens of a stream, by what runs beside it.
    """

    short: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    after_quiet: list[float] = field(default_factory=list)
    long: dict[str, list[float]] = field(default_factory=dict)
    gaps: dict[str, list[float]] = field(default_factory=dict)


class Requests:
    """Requests of random prompts to one server.

    Args:
        client: of the server.
        vocabulary: the model's.
        rng: for prompts and pauses.
    """

    def __init__(self, client: AsyncClient, vocabulary: int, rng: random.Random) -> None:
        self._client, self._vocabulary, self._rng = client, vocabulary, rng

    async def first_token(self, tokens: int) -> float:
        """Seconds until the only token of a prompt of so many tokens."""
        prompt = [self._rng.randrange(self._vocabulary) for _ in range(tokens)]
        began = time.perf_counter()
        await self._client.generate(prompt, max_tokens=1, ignore_eos=True)
        return time.perf_counter() - began

    async def pause(self) -> None:
        """A random time, so that requests come at any point of a step."""
        await asyncio.sleep(self._rng.expovariate(1 / _PAUSE))

    @asynccontextmanager
    async def streaming(self, most_tokens: int) -> AsyncIterator[Callable[[], Awaitable[list[float]]]]:
        """A stream while the block runs, begun again when it ends.

        Gives a function for the times between its tokens since that was last called. It waits for the first
        of them: where a server is so slow that no token came meanwhile, that is the longest time of all.
        """
        gaps: asyncio.Queue[float] = asyncio.Queue()

        async def stream() -> None:
            while True:
                before = None
                async for _ in self._client.stream([1], max_tokens=most_tokens, ignore_eos=True):
                    now = time.perf_counter()
                    if before is not None:
                        gaps.put_nowait(now - before)
                    before = now

        async def since() -> list[float]:
            found = [await gaps.get()]
            while not gaps.empty():
                found.append(gaps.get_nowait())
            return found

        async with _beside([stream()]):
            await since()
            yield since

    @asynccontextmanager
    async def long_prompts(self, many: int, tokens: int) -> AsyncIterator[None]:
        """So many long prompts at a time while the block runs."""

        async def again_and_again() -> None:
            while True:
                await self.first_token(tokens)

        async with _beside([again_and_again() for _ in range(many)]):
            await asyncio.sleep(_WARM)
            yield


@asynccontextmanager
async def _beside(works: Sequence[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Runs endless coroutines beside the block; a failure of one ends the block and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
            yield
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def measure(address: Address, repeats: int, long: int, seed: int = 0) -> Waits:
    """Measures everything once.

    Args:
        address: of a server without a prefix cache that does nothing else.
        repeats: short requests of each length and beside each load.
        long: tokens of a long prompt, at most.
        seed: of prompts and pauses.

    Raises:
        longspan.LongspanError: a request failed.
    """
    found = Waits()
    async with AsyncClient(address.host, address.port) as client:
        model = await client.model_info()
        requests = Requests(client, model.vocabulary_size, random.Random(seed))
        long = min(long, model.context_length - 1)
        most = model.context_length - 1
        for tokens in SHORT:
            await requests.first_token(tokens)

        async def short(beside: str) -> None:
            for _ in range(repeats):
                for tokens in SHORT:
                    await requests.pause()
                    found.short.setdefault((beside, tokens), []).append(await requests.first_token(tokens))

        await short("nothing")
        found.long["nothing"] = [await requests.first_token(long) for _ in range(2)]
        async with requests.streaming(most) as gaps:
            await asyncio.sleep(_QUIET)
            found.gaps["nothing"] = await gaps()
            found.long["a stream"] = [await requests.first_token(long) for _ in range(2)]
            found.gaps["a long prompt"] = await gaps()
        for many in (1, 4):
            async with requests.long_prompts(many, long):
                await short(f"{many} long")
        async with requests.long_prompts(1, long):
            for _ in range(repeats):
                await asyncio.sleep(_QUIET)
                found.after_quiet.append(await requests.first_token(SHORT[0]))
    return found


def table(found: Waits) -> Columns:
    """Milliseconds: medians, worst ones, and medians as multiples of those with nothing beside."""
    rows = Columns("", ["median ms", "p99 ms", "x alone", "requests"])

    def add(name: str, values: Sequence[float], alone: Sequence[float]) -> None:
        times = "" if alone is values else figure(statistics.median(values) / statistics.median(alone))
        p99 = percentile(sorted(values), 0.99)
        rows.add_row(
            name, figure(1e3 * statistics.median(values)), figure(1e3 * p99), times, str(len(values))
        )

    for (beside, tokens), values in found.short.items():
        add(f"TTFT of {tokens} tokens beside {beside}", values, found.short["nothing", tokens])
    quiet = f"TTFT of {SHORT[0]} tokens, after a quiet second"
    add(quiet, found.after_quiet, found.short["nothing", SHORT[0]])
    for beside, values in found.long.items():
        add(f"TTFT of a long prompt beside {beside}", values, found.long["nothing"])
    for beside, values in found.gaps.items():
        add(f"between a stream's tokens beside {beside}", values, found.gaps["nothing"])
    return rows


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", metavar="N", type=count, default=12, help="short requests of each kind (%(default)s)"
    )
    parser.add_argument(
        "--long-tokens", metavar="N", type=count, default=LONG, help="of a long prompt, at most (%(default)s)"
    )
    parser.add_argument("serve", nargs="*", help="further arguments for `longspan serve`, after --")
    arguments = parser.parse_args()
    try:
        with serve("--no-prefix-cache", *arguments.serve) as address:
            found = asyncio.run(measure(address, arguments.repeats, arguments.long_tokens))
    except (NotStartedError, LongspanError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    Console().print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
