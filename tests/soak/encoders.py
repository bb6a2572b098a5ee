"""Servers of small encoders beside the one of a run, and users who compare with the first answers."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from longspan import AsyncClient, BusyError, LongspanError
from tests.e2e.server import Server
from tests.encoders.zoo import save_encoder
from tests.soak.record import Record

ENCODER_KILLED = "encoder killed"
"""The fault in which an encoder's engine is killed."""

ENCODERS = {"masks": "MaskedLM", "labels": "SequenceClassification"}
"""Heads by name: both embed, the first fills masks, the second scores."""

_USERS = 2
_WORDS = ("the", "module", "returns", "a", "list", "of", "names", "which", "help", "prints", "on", "request")
# Vectors and logits are some units large; a text in another batch differs by rounding.
_TOLERANCE = 1e-4
# How often each is done, among 100 calls.
_SHARES = {"whole": 80, "deadline": 10, "cancelled": 10}
_CANARIES = 3
# Long texts of a canary, so that it is under way for most of the time; few, so that users have room.
_MANY = 6
_PATIENCE = 20.0
_READY_SECONDS = 60.0
# A client that gets an error waits, and does not turn a fault into a storm.
_AGAIN_SECONDS = 0.1


class Request(NamedTuple):
    """What a user asks.

    Attributes:
        method: embed, tokens, score or fill.
        texts: of it.
    """

    method: str
    texts: list[str]


class EncoderLoad:
    """A server of one encoder and its users.

    Args:
        name: one of ``ENCODERS``.
        server: that serves it.
        record: counts and compares for the run.
        connect: makes a client of it for the identity of that name.
    """

    def __init__(
        self, name: str, server: Server, record: Record, connect: Callable[[str], AsyncClient]
    ) -> None:
        self.server = server
        self._methods = ["embed", "tokens", "fill" if name == "masks" else "score"]
        self._record = record
        self._connect = connect
        self._asked: list[tuple[Request, list[float]]] = []
        self.ended = False

    async def prepare(self, rng: random.Random) -> None:
        """Asks everything once, one at a time."""
        async with self._connect("user") as client:
            for method in self._methods:
                for count in (1, 2, 5):
                    request = Request(
                        method, [_text(rng, method, rng.randrange(1, 60)) for _ in range(count)]
                    )
                    self._asked.append((request, await _answer(client, request, _PATIENCE)))

    async def users(self, rng: random.Random) -> None:
        """Users that go on until they are told to end."""
        async with self._connect("user") as client, asyncio.TaskGroup() as group:
            for _ in range(_USERS):
                group.create_task(self._user(client, random.Random(rng.random())))

    async def ask_again(self) -> None:
        """Asks everything once more, of a server that is idle again."""
        async with self._connect("user") as client:
            for request, expected in self._asked:
                self._compare(request, await _answer(client, request, _PATIENCE), expected)

    async def _user(self, client: AsyncClient, rng: random.Random) -> None:
        while not self.ended:
            request, expected = rng.choice(self._asked)
            (how,) = rng.choices(list(_SHARES), list(_SHARES.values()))
            status = "OK"
            try:
                if how == "cancelled":
                    await _begun_and_left(client, request, rng.uniform(0, 0.01))
                else:
                    seconds = rng.uniform(0.001, 0.05) if how == "deadline" else 60
                    self._compare(request, await _answer(client, request, seconds), expected)
            except LongspanError as error:
                status = error.code.name
            self._record.now.real[request.method, status] += 1
            await asyncio.sleep(0 if status in ("OK", "DEADLINE_EXCEEDED") else _AGAIN_SECONDS)

    def _compare(self, request: Request, found: Sequence[float], expected: Sequence[float]) -> None:
        same = len(found) == len(expected) and all(
            math.isclose(one, other, rel_tol=0, abs_tol=_TOLERANCE)
            for one, other in zip(found, expected, strict=True)
        )
        self._record.now.compared += 1
        if not same:
            self._record.now.wrong.append(
                f"{request.method} of {len(request.texts)} texts gave something else"
            )

    async def lose_engine(self) -> None:
        """Its engine is killed under requests, which end with UNAVAILABLE; another answers as before."""
        engine = self.server.engine_pid
        rng = random.Random(engine)
        request = Request("embed", [_text(rng, "embed", 59) for _ in range(_MANY)])
        async with self._connect("canary") as client:
            errors: list[tuple[LongspanError, float]] = []
            answered = 0

            async def canary() -> None:
                nonlocal answered
                while True:
                    try:
                        await _answer(client, request, _PATIENCE)
                        answered += 1
                    except BusyError:  # others' texts fill the queue
                        await asyncio.sleep(_AGAIN_SECONDS)
                    except LongspanError as error:
                        errors.append((error, time.monotonic()))
                        return

            tasks = [asyncio.create_task(canary()) for _ in range(_CANARIES)]
            while answered < _CANARIES and not errors:  # noqa: ASYNC110 (counts send no event)
                await asyncio.sleep(0.01)
            begun = time.monotonic()
            os.kill(engine, signal.SIGKILL)
            await asyncio.wait_for(asyncio.gather(*tasks), _PATIENCE)
            self._record.now.found["streams ended after"] = max(when for _, when in errors) - begun
            self._record.now.wrong += [
                f"{error.code.name}: {error}" for error, _ in errors if error.code.name != "UNAVAILABLE"
            ]
            await client.wait_until_ready(timeout=_READY_SECONDS)
            self._record.now.found["ready again after"] = time.monotonic() - begun
        await self.ask_again()


def start_encoder(name: str, folder: Path, *options: str | Path) -> Server:
    """A server of an encoder with random weights.

    Args:
        name: one of ``ENCODERS``.
        folder: for the model.
        options: of ``longspan serve``.
    """
    model = save_encoder("bert", folder, ENCODERS[name], max_position_embeddings=256)
    return Server("--model", model, "--threads", "1", "--max-running", "8", *options)


def _text(rng: random.Random, method: str, words: int) -> str:
    drawn = rng.choices(_WORDS, k=words)
    if method == "fill":
        drawn[rng.randrange(words)] = "[MASK]"
    return " ".join(drawn)


async def _answer(client: AsyncClient, request: Request, seconds: float) -> list[float]:
    """All numbers of an answer."""
    match request.method:
        case "embed":
            embedded = await client.embed(request.texts, timeout=seconds)
        case "tokens":
            embedded = await client.embed(request.texts, pooling="none", timeout=seconds)
        case "score":
            scored = await client.score(request.texts, timeout=seconds)
            return [logit for scores in scored.scores for logit in scores.logits]
        case _:
            filled = await client.fill_mask(request.texts, timeout=seconds)
            return [token.logprob for text in filled.texts for mask in text.masks for token in mask.tokens]
    return [value for embedding in embedded.embeddings for value in embedding.values]


async def _begun_and_left(client: AsyncClient, request: Request, seconds: float) -> None:
    task = asyncio.create_task(_answer(client, request, _PATIENCE))
    await asyncio.wait({task}, timeout=seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
