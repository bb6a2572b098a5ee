"""Real clients: what users of the public client do. Answers are compared with the unloaded server's."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from loadtest.greedy import GREEDY
from longspan import AsyncClient, AsyncStream, FinishReason, Generation, LongspanError
from longspan.request import Prompt
from longspan.v1 import encoder_pb2
from tests.soak.record import Record

# How often each is done, among 100 calls.
_SHARES = {
    "stream": 24,
    "unary": 14,
    "samples": 4,
    "beams": 4,
    "cancelled": 12,
    "aborted": 6,
    "deadline": 8,
    "slow reader": 8,
    "tokenize": 8,
    "count": 6,
    "detokenize": 6,
}
_WORDS = ("the", "river", "runs", "past", "old", "mills", "where", "children", "look", "for", "crayfish")


@dataclass
class Question:
    """A prompt, and what the unloaded server said to it.

    Attributes:
        prompt: text, a conversation, or token ids.
        max_tokens: of the answer.
        answer: its greedy tokens.
        text: of these.
        beams: the tokens of its two best beams.
    """

    prompt: Prompt
    max_tokens: int
    answer: Sequence[int] = ()
    text: str = ""
    beams: Sequence[Sequence[int]] = ()


class BeamOptions(TypedDict):
    """Options of ``Client.generate`` for beam search."""

    num_beams: int
    n: int
    max_tokens: int


_BEAMS: BeamOptions = {"num_beams": 3, "n": 2, "max_tokens": 12}


async def questions(client: AsyncClient, rng: random.Random) -> list[Question]:
    """Texts, conversations and long lists of ids, asked one at a time."""
    info = await client.model_info()
    room = info.context_length // 4

    def text(words: int) -> str:
        return " ".join(rng.choices(_WORDS, k=words))

    ids = [rng.randrange(3, info.vocabulary_size) for _ in range(min(room, 900))]
    asked = [
        *(Question(text(words), 40) for words in (1, 5, 20, 60)),
        *(Question([("user", text(words))], 60) for words in (4, 30) if info.has_chat_template),
        *(Question(ids[:length], 24) for length in (room // 4, len(ids))),
    ]
    for question in asked:
        answer = await client.generate(question.prompt, max_tokens=question.max_tokens, **GREEDY)
        question.answer, question.text = answer.token_ids, answer.text
        question.beams = await _beams(client, question)
    return asked


async def _beams(client: AsyncClient, question: Question) -> list[list[int]]:
    answer = await client.generate(question.prompt, timeout=60, **_BEAMS, **GREEDY)
    return [list(each.token_ids) for each in answer.completions]


class Counted(AsyncClient):
    """A client whose calls to the engine are counted. It repeats none, which the server alone would count."""

    def __init__(self, host: str, port: int, token: str, record: Record) -> None:
        super().__init__(host, port, token=token, retries=False)
        self._record = record

    async def generate(self, *arguments: Any, **options: Any) -> Generation:
        """As of ``AsyncClient``."""
        self._record.sent += 1
        return await super().generate(*arguments, **options)

    def stream(self, *arguments: Any, **options: Any) -> AsyncStream:
        """As of ``AsyncClient``."""
        self._record.sent += 1
        return super().stream(*arguments, **options)

    async def embed(self, *arguments: Any, **options: Any) -> encoder_pb2.EmbedResponse:
        """As of ``AsyncClient``."""
        self._record.sent += 1
        return await super().embed(*arguments, **options)

    async def score(self, *arguments: Any, **options: Any) -> encoder_pb2.ScoreResponse:
        """As of ``AsyncClient``."""
        self._record.sent += 1
        return await super().score(*arguments, **options)

    async def fill_mask(self, *arguments: Any, **options: Any) -> encoder_pb2.FillMaskResponse:
        """As of ``AsyncClient``."""
        self._record.sent += 1
        return await super().fill_mask(*arguments, **options)


class Users:
    """Clients that go on asking until they are told to end."""

    def __init__(self, client: AsyncClient, asked: list[Question], record: Record) -> None:
        self._client = client
        self._asked = asked
        self._record = record
        self._texts = [question for question in asked if isinstance(question.prompt, str)]
        self.ended = False

    async def one(self, rng: random.Random) -> None:
        """One user."""
        while not self.ended:
            (kind,) = rng.choices(list(_SHARES), list(_SHARES.values()))
            question = rng.choice(self._asked)
            try:
                await self._call(kind, question, rng)
                status = "OK"
            except LongspanError as error:
                status = error.code.name
            self._record.now.real[kind, status] += 1
            if status not in ("OK", "DEADLINE_EXCEEDED"):
                await asyncio.sleep(0.1)  # as clients do, who don't turn a fault into a storm

    async def _call(self, kind: str, question: Question, rng: random.Random) -> None:
        match kind:
            case "unary":
                await self.ask(question)
            case "samples":
                await self.ask(question, samples=3)
            case "beams":
                await self._search(question)
            case "tokenize" | "count" | "detokenize":
                await self._text(kind, rng)
            case "deadline":
                await self._stream(question, seconds=rng.uniform(0.01, 1))
            case "cancelled":
                await self._stream(question, leave_after=rng.randrange(12))
            case "slow reader":
                await self._stream(question, pause=rng.uniform(0.01, 0.1))
            case "aborted":
                await self._stream(question, abort_after=rng.randrange(1, 12), request_id=f"{rng.random()}")
            case _:
                await self._stream(question)

    async def ask(self, question: Question, samples: int = 1) -> None:
        """Asks it once, for so many samples, which are all the same."""
        answer = await self._client.generate(
            question.prompt, max_tokens=question.max_tokens, n=samples, timeout=60, **GREEDY
        )
        for sample in answer.completions:
            self._record.now.tokens += len(sample.token_ids)
            self._compare(question, sample.token_ids, sample.text, whole=True)

    async def _search(self, question: Question) -> None:
        found = await _beams(self._client, question)
        self._record.now.tokens += sum(map(len, found))
        self._record.now.compared += 1
        if found != question.beams:
            self._record.now.wrong.append(f"beams {found} came where {question.beams} were due")

    async def _stream(
        self,
        question: Question,
        *,
        seconds: float = 60,
        leave_after: int | None = None,
        abort_after: int | None = None,
        pause: float = 0,
        request_id: str = "",
    ) -> None:
        tokens: list[int] = []
        text = ""
        cut = True
        last: float | None = None
        reason: FinishReason | None = None
        options = GREEDY | {"max_tokens": question.max_tokens, "request_id": request_id}
        try:
            async with self._client.stream(question.prompt, timeout=seconds, **options) as stream:
                async for delta in stream:
                    now = time.monotonic()
                    if last is not None and not pause:
                        self._record.now.gaps.append(now - last)
                    last = now
                    tokens += delta.token_ids
                    text += delta.text
                    reason = delta.finish_reason
                    self._record.now.tokens += len(delta.token_ids)
                    if leave_after is not None and len(tokens) >= leave_after:
                        break
                    if abort_after is not None and len(tokens) >= abort_after:
                        abort_after = None
                        await self._client.abort(request_id, timeout=60)
                    await asyncio.sleep(pause)
                else:
                    # Only a stream that was aborted may end before its answer does.
                    cut = bool(request_id) and reason is FinishReason.ABORTED
        finally:
            self._compare(question, tokens, text, whole=not cut)

    async def _text(self, kind: str, rng: random.Random) -> None:
        text = str(rng.choice(self._texts).prompt)
        ids = list((await self._client.tokenize(text, timeout=60)).token_ids)
        if kind == "count":
            same = (await self._client.count_tokens(text, timeout=60)).token_count == len(ids)
        elif kind == "detokenize":
            same = await self._client.detokenize(ids, timeout=60) == text
        else:
            same = bool(ids)
        if not same:
            self._record.now.wrong.append(f"{kind} of {text!r} gave something else")

    def _compare(self, question: Question, tokens: Sequence[int], text: str, *, whole: bool) -> None:
        """Notes what the unloaded server did not say; a part must be how its answer begins."""
        expected = list(question.answer)
        if list(tokens) != (expected if whole else expected[: len(tokens)]):
            self._record.now.wrong.append(f"{list(tokens)} came where {expected} was due")
        # A part may end within a character, for which U+FFFD stands.
        if text != question.text if whole else not question.text.startswith(text.rstrip("\ufffd")):
            self._record.now.wrong.append(f"{text!r} came where {question.text!r} was due")
        self._record.now.compared += bool(tokens)
