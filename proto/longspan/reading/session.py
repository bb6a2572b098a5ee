"""The requests of one reading: so many at once, sent again where the server is too busy, and counted."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar, Unpack

from longspan.aio import AsyncClient
from longspan.errors import BusyError, UnavailableError
from longspan.reading.types import Note, ReadOptions, Spent
from longspan.request import GenerateOptions
from longspan.results import FinishReason

Result = TypeVar("Result")

_ATTEMPTS = 30  # of a request that a busy server turns away, saying when to come again
_PAUSE = 1.0  # seconds between attempts while the server is away
RESTART_SECONDS = 120.0
"""For which a server that has answered before may be away, as while it restarts."""

SCORED_TOKENS = 64
"""Tokens of a text, from its beginning, whose log probability is looked at; each takes a step."""


class Session:
    """The requests of one reading. Within a stage they run at once.

    Args:
        client: of the server.
        options: of the reading.
        chat: the model has a chat template.
        spent: is counted up.
    """

    def __init__(self, client: AsyncClient, options: ReadOptions, chat: bool, spent: Spent) -> None:
        self._client, self._options, self._chat, self._spent = client, options, chat, spent
        self._free = asyncio.Semaphore(options.concurrency)
        self._answered = False

    async def all(self, stage: str, calls: Sequence[Callable[[], Awaitable[Result]]]) -> list[Result]:
        """Results of all calls, in their order; the first that fails ends the others.

        Args:
            stage: its name, for the listener.
            calls: each makes one request of this session.

        Raises:
            longspan.LongspanError: one failed.
        """
        done = 0

        async def run(call: Callable[[], Awaitable[Result]]) -> Result:
            nonlocal done
            async with self._free:
                result = await call()
            done += 1
            self._options.listener(stage, done, len(calls))
            return result

        if calls:
            self._options.listener(stage, 0, len(calls))
        tasks = [asyncio.ensure_future(run(call)) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def write(self, prompt: str, max_tokens: int, sources: tuple[int, ...]) -> Note:
        """The model's most likely answer to a prompt.

        Args:
            prompt: as ``longspan.reading.prompts`` makes it.
            max_tokens: of the answer.
            sources: indexes of the passages that the prompt is about.

        Raises:
            longspan.LongspanError: the server refused it.
        """
        return await self._generate(prompt, sources, max_tokens=max_tokens)

    async def score(self, prompt: str, answer: Sequence[int]) -> float:
        """Mean log probability of an answer's first 64 tokens, in nats, had the model given it to the prompt.

        Args:
            prompt: as of ``write``.
            answer: its tokens, at least one.

        Raises:
            longspan.LongspanError: the server refused it.
        """
        ids = answer[:SCORED_TOKENS]
        return (
            await self._generate(prompt, (), max_tokens=len(ids), forced_token_ids=ids, ignore_eos=True)
        ).logprob

    async def _generate(
        self, prompt: str, sources: tuple[int, ...], **options: Unpack[GenerateOptions]
    ) -> Note:
        shared: GenerateOptions = {
            "model": self._options.model,
            "temperature": 0,
            "logprobs": 0,
            "special_tokens_as_text": True,
        }
        call = functools.partial(self._client.generate, self._shaped(prompt), **(shared | options))
        generation = await self._patiently(call)
        usage, spent = generation.usage, self._spent
        spent.requests += 1
        spent.prompt_tokens += usage.prompt_tokens
        spent.cached_prompt_tokens += usage.cached_prompt_tokens
        spent.completion_tokens += usage.completion_tokens
        answer = generation.completions[0]
        ends = answer.finish_reason is FinishReason.STOP
        ids = answer.token_ids[:-1] if ends and isinstance(answer.matched_stop, int) else answer.token_ids
        logprobs = [position.chosen.logprob for position in answer.logprobs[: len(ids)]]
        mean = sum(logprobs[:SCORED_TOKENS]) / max(1, len(logprobs[:SCORED_TOKENS]))
        return Note(answer.text.strip(), ids, mean, ends, sources)

    async def count_prompt(self, prompt: str) -> int:
        """Tokens of a prompt as ``write`` sends it."""
        return await self.count(self._shaped(prompt))

    async def tokens(self, text: str) -> list[int]:
        """Token ids of a text as part of a prompt."""
        found = await self._patiently(
            lambda: self._client.tokenize(
                text, model=self._options.model, special_tokens=False, special_tokens_as_text=True
            )
        )
        return list(found.token_ids)

    async def count(self, value: str | list[tuple[str, str]]) -> int:
        """Tokens of a text, with those that the tokenizer puts around it, or of messages."""
        counted = await self._patiently(
            lambda: self._client.count_tokens(value, model=self._options.model, special_tokens_as_text=True)
        )
        return counted.token_count

    def _shaped(self, prompt: str) -> str | list[tuple[str, str]]:
        """A prompt for the model's chat template, or as text that an answer follows."""
        return [("user", prompt)] if self._chat else f"{prompt}\n\nAnswer:"

    async def _patiently(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """A call, made again when a busy server says so, or while a server is away that has answered before.

        All requests are greedy and none changes the server, so each may be repeated.
        """
        turned_away, away_since = 0, 0.0
        while True:
            try:
                found = await call()
            except BusyError as error:
                turned_away += 1
                if error.retry_after is None or turned_away == _ATTEMPTS:
                    raise
                pause = error.retry_after
            except UnavailableError:
                now = time.monotonic()
                away_since = away_since or now
                if not self._answered or now - away_since > RESTART_SECONDS:
                    raise
                pause = _PAUSE
            else:
                self._answered = True
                return found
            self._spent.waits += 1
            await asyncio.sleep(pause)
