"""A server as a target of rounds: it is measured through the client, like any other."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from loadtest.measuring.arrivals import arrival_times
from loadtest.measuring.loops import loop_factory
from loadtest.measuring.records import Record
from loadtest.measuring.requests import closed_loop, open_loop
from loadtest.measuring.types import CannotMeasureError, Load
from longspan import AsyncClient

Value = TypeVar("Value")

_WARMUP = (64, 4)  # tokens of the prompt and of the output
_IDLE_SECONDS = 30.0
_LOOK_SECONDS = 0.01


class Run(Protocol):
    """Runs a coroutine to its end. One event loop serves all targets: gRPC has one poller for a process."""

    def __call__(self, work: Coroutine[Any, Any, Value], /) -> Value:
        """Gives what the coroutine returns."""
        ...


class Served:
    """Puts loads on one server.

    Prompts are of random tokens, drawn from the seed; answers are greedy and of an exact length. The
    first request, which a server answers more slowly than any later one, is sent at once and counts nowhere.

    Args:
        run: see ``Run``.
        host: of the server.
        port: its gRPC port.
        pids: its processes on this machine; none if it is on another.

    Raises:
        longspan.LongspanError: it does not answer.
    """

    def __init__(self, run: Run, host: str, port: int, pids: tuple[int, ...] = ()) -> None:
        self._run, self.host, self.port, self.pids = run, host, port, pids
        self._known: set[tuple[int, int]] = set()
        self._client = run(_connected(host, port))
        try:
            model = run(self._client.model_info())
            self._vocabulary = model.vocabulary_size
            self._page = run(self._client.server_info()).load.page_size
            prompt, output = _WARMUP
            run(closed_loop(self._client, [self._draw(prompt, "warm-up")], output, 1))
        except BaseException:
            self.close()
            raise

    def allow(self, seconds: float) -> None:
        """No request of a later measurement may take longer: one that hangs fails."""
        self._client.timeout = seconds

    def close(self) -> None:
        """Closes the connection."""
        self._run(self._client.close())

    def measure(self, load: Load, seed: int) -> Mapping[str, float]:
        """Puts the load on the server once, and waits until it is idle again.

        Args:
            load: with ``cached``, prompts go out first, uncounted, that the server does not know.
            seed: of the prompts, or of their last pages.

        Returns:
            ``tpot``: of new prompts the median of ``Record.tpot``, of cached ones the median time from a
            stream's token to its next; there is none where all tokens came in one message.
            ``output_rate``: tokens of all streams over the time from the first request to the last token. For
            new prompts also ``ttft``: median, from when the request should have been sent; ``prefill_rate``:
            median of prompt tokens over time to first token. Seconds, tokens per second.

        Raises:
            longspan.LongspanError: a request failed.
            CannotMeasureError: the server did not keep the prompts that should be cached, or knew new ones.
        """
        figures = self._cached(load, seed) if load.cached else self._new(load, seed)
        self._run(self._idle())
        return figures

    def _new(self, load: Load, seed: int) -> dict[str, float]:
        length = _prompt_tokens(load)
        prompts = [self._draw(length, f"{seed} {load.label} {place}") for place in range(_requests(load))]
        records = self._send(load, prompts, seed)
        if any(record.cached_tokens for record in records):
            raise CannotMeasureError(
                "the server's prefix cache knows the prompts, which should be new; measure with another seed"
            )
        figures = {
            "ttft": statistics.median(record.arrivals[0][0] - record.intended for record in records),
            "output_rate": _output_rate(records),
            "prefill_rate": statistics.median(
                record.prompt_tokens / (record.arrivals[0][0] - record.sent) for record in records
            ),
        }
        times = [record.tpot for record in records if record.tpot is not None]
        return figures | ({"tpot": statistics.median(times)} if times else {})

    def _cached(self, load: Load, seed: int) -> dict[str, float]:
        length = _prompt_tokens(load)
        last = (length - 1) % self._page + 1  # at least one token of a prompt is computed
        users = load.users
        known = length - last
        for attempt in range(2):
            missing = [user for user in range(users) if (length, user) not in self._known]
            firsts = [self._prompt(user, known, last, "first") for user in missing]
            if firsts:
                self._run(closed_loop(self._client, firsts, 1, 1))
                self._known.update((length, user) for user in missing)
            prompts = [
                self._prompt(place % users, known, last, f"{seed} {load.label} {attempt} {place}")
                for place in range(_requests(load))
            ]
            records = self._send(load, prompts, seed)
            lost = {record.session % users for record in records if record.cached_tokens < known}
            if not lost:
                gaps = [gap for record in records for gap in _gaps(record)]
                figures = {"output_rate": _output_rate(records)}
                return figures | ({"tpot": statistics.median(gaps)} if gaps else {})
            self._known -= {(length, user) for user in lost}
        raise CannotMeasureError(
            f"the server did not keep {len(lost)} of {users} prompts of {known} tokens in its prefix cache; "
            "give more --kv-memory, fewer users or shorter contexts, and no --no-prefix-cache"
        )

    def _send(self, load: Load, prompts: list[list[int]], seed: int) -> list[Record]:
        if not load.rate:
            return self._run(closed_loop(self._client, prompts, load.output_tokens, load.concurrency))
        begins = arrival_times(load.requests, load.rate, 1.0, seed)
        return self._run(open_loop(self._client, prompts, load.output_tokens, begins))

    def _prompt(self, user: int, known: int, last: int, seed: str) -> list[int]:
        """A user's prompts share a beginning at all contexts: most of a shorter one may be cached already."""
        return self._draw(known, f"user {user}") + self._draw(last, f"user {user} {seed}")

    def _draw(self, count: int, seed: str) -> list[int]:
        """Token ids; the lowest are special tokens in most vocabularies."""
        low = min(1000, self._vocabulary // 2)
        return random.Random(seed).choices(range(low, self._vocabulary), k=count)

    async def _idle(self) -> None:
        """Waits until no sequence is left, so that the next cell begins on an idle machine."""
        end = time.monotonic() + _IDLE_SECONDS
        while True:
            load = (await self._client.server_info(timeout=_IDLE_SECONDS)).load
            if not load.running and not load.waiting:
                return
            if time.monotonic() > end:
                raise CannotMeasureError(
                    f"the server has other work: {load.running} sequences still run and {load.waiting} wait; "
                    "measure when it has none"
                )
            await asyncio.sleep(_LOOK_SECONDS)


@contextmanager
def event_loop() -> Iterator[Run]:
    """An event loop for targets; Ctrl-C ends what it runs."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        yield runner.run


async def _connected(host: str, port: int) -> AsyncClient:
    return AsyncClient(host, port, retries=False)  # its channel belongs to the loop that runs


def _requests(load: Load) -> int:
    """Fewer than users would measure fewer users."""
    return max(load.requests, load.users)


def _prompt_tokens(load: Load) -> int:
    length = load.context - load.output_tokens
    if length < 1:
        raise CannotMeasureError(
            f"{load.output_tokens} output tokens leave no room for a prompt in a context of {load.context}"
        )
    return length


def _gaps(record: Record) -> list[float]:
    """Seconds per token from each message to the next."""
    counts = [count for _, count in record.arrivals[1:]]
    return [gap / count for gap, count in zip(record.gaps, counts, strict=True)]


def _output_rate(records: Sequence[Record]) -> float:
    first = min(record.sent for record in records)
    return sum(record.tokens for record in records) / (
        max(record.arrivals[-1][0] for record in records) - first
    )
