"""Requests to a server with OpenAI's HTTP interface: completions and chat completions, streamed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from loadtest.load.answer import MOST_WORDS, Answer, FailedError, words
from loadtest.load.targets import Endpoint, EndpointError
from loadtest.load.tokens import counter, spread_evenly
from loadtest.load.types import Turn
from loadtest.measuring.records import Record

_CONNECT_SECONDS = 10.0
# Seconds to wait for the stream's end after its last message.
_END_SECONDS = 1.0
_HINTS = {
    400: "if it does not know a field or token ids, change --endpoint-extra or --endpoint-prompts",
    401: "name the variable that holds its key with --endpoint-key-env",
    403: "name the variable that holds its key with --endpoint-key-env",
    404: "look at --endpoint, which mostly ends in /v1, at --endpoint-model and at --endpoint-api",
    422: "if it does not know a field or token ids, change --endpoint-extra or --endpoint-prompts",
}


@asynccontextmanager
async def http_sender(endpoint: Endpoint) -> AsyncIterator[HttpSender]:
    """A sender with a pool of connections to one endpoint, which the first request begins to fill."""
    async with http_client(endpoint) as client:
        yield HttpSender(endpoint, client)


class HttpSender:
    """Sends requests to one endpoint.

    Tokens are counted by the endpoint's tokenizer where it names one: not while streams are timed, but in
    ``finish``. Else ``usage`` counts them, spread evenly over the messages.
    """

    def __init__(self, endpoint: Endpoint, client: httpx2.AsyncClient) -> None:
        self._endpoint, self._client = endpoint, client
        path = "/chat/completions" if endpoint.api == "chat" else "/completions"
        self._url = endpoint.url + path
        self._uncounted: list[tuple[Record, list[str]]] = []

    async def send(self, turn: Turn, record: Record) -> str:
        """Sends one greedy request and times its stream; gives its text. A failure is in the record.

        An answer of another length than asked for is no failure: not every server can be told to go on.
        """
        answer = Answer()
        content = json.dumps(body(self._endpoint, turn)).encode()
        try:
            async for when, text in self._stream(content, record, answer):
                record.arrivals.append((when, 1))
                answer.parts.append(text)
        except FailedError as error:
            record.code, record.error = error.code, str(error)
        finally:
            record.ended = answer.ended or time.monotonic()
            self._count(record, answer)
        return "".join(answer.parts)

    def finish(self) -> None:
        """Counts the tokens of what was received, with the endpoint's tokenizer."""
        if self._endpoint.tokenizer is None:
            return
        tokens = counter(self._endpoint.tokenizer)
        for record, parts in self._uncounted:
            times = [when for when, _ in record.arrivals]
            record.arrivals = list(zip(times, tokens.per_part(parts), strict=True))
        self._uncounted.clear()

    async def _stream(
        self, content: bytes, record: Record, answer: Answer
    ) -> AsyncIterator[tuple[float, str]]:
        """Texts and when they came. Raises ``FailedError``."""
        response: httpx2.Response | None = None
        try:
            response = await self._open(content, record)
            if response.status_code != 200:
                raise await _refused(response)
            async with asyncio.timeout(None) as limit:
                async for event in httpx2.EventSource(response):
                    now = time.monotonic()
                    if event.data == "[DONE]":
                        answer.ended = answer.ended or now
                        limit.reschedule(asyncio.get_running_loop().time() + _END_SECONDS)
                    elif not answer.ended and (text := answer.take(event.data)):
                        yield now, text
        except TimeoutError:
            pass  # it is done, and keeps its stream open
        except httpx2.SSEError as error:
            raise FailedError("NOT_A_STREAM", f"the answer is not a stream of events: {error}") from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            where = self._endpoint.url
            raise FailedError("UNAVAILABLE", f"no server answers at {where}: {error or 'in time'}") from error
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            if not answer.ended:
                raise FailedError(
                    "DISCONNECTED" if response is not None else "UNAVAILABLE",
                    f"the connection broke after {len(answer.parts)} messages with text: "
                    f"{error or type(error).__name__}",
                ) from error
        finally:
            if response is not None:
                await response.aclose()
        if not answer.ended and not answer.finish_reason:
            raise FailedError(
                "DISCONNECTED", f"the stream ended early, after {len(answer.parts)} messages with text"
            )
        if not answer.parts:
            raise FailedError(
                "NO_TEXT", "the endpoint answered without any text, so that nothing can be timed"
            )
        if self._endpoint.tokenizer is None and answer.told("completion_tokens") is None:
            raise FailedError(
                "NO_USAGE",
                "the endpoint does not tell how many tokens it generated (stream_options.include_usage); "
                "give --tokenizer, to count them here",
            )

    async def _open(self, content: bytes, record: Record) -> httpx2.Response:
        """Sends a request and waits for its answer to begin.

        A server may close an idle connection just when it is used again. A request that it leaves without an
        answer for that reason goes out on another one, and counts as sent then.
        """
        headers = {"Accept": "text/event-stream", "Content-Type": "application/json"}
        while True:
            seen: list[str] = []

            async def note(event: str, _: object, seen: list[str] = seen) -> None:
                seen.append(event)

            request = self._client.build_request(
                "POST", self._url, content=content, headers=headers, extensions={"trace": note}
            )
            record.sent = time.monotonic()
            try:
                return await self._client.send(request, stream=True)
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
                if any(event.startswith("connection.connect_tcp") for event in seen):
                    raise

    def _count(self, record: Record, answer: Answer) -> None:
        told = answer.told("completion_tokens")
        record.prompt_tokens = answer.told("prompt_tokens") or 0
        record.cached_tokens = answer.cached
        if self._endpoint.tokenizer is not None:
            record.told_tokens = told or 0
            self._uncounted.append((record, answer.parts))
        elif told is not None and record.arrivals:
            times = [when for when, _ in record.arrivals]
            record.arrivals = list(zip(times, spread_evenly(told, len(times)), strict=True))


def http_client(endpoint: Endpoint) -> httpx2.AsyncClient:
    """A client that waits for answers as long as they take."""
    headers = {"Accept-Encoding": "identity"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    return httpx2.AsyncClient(
        headers=headers,
        timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=not endpoint.local,  # a proxy of the environment is not for this machine
    )


def body(endpoint: Endpoint, turn: Turn) -> dict[str, Any]:
    """The JSON of a request: greedy, streamed, with usage at the end.

    Raises:
        EndpointError: this prompt can't be sent through this interface.
    """
    fields: dict[str, Any] = {
        "model": endpoint.model,
        "max_tokens": turn.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    prompt = turn.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], tuple):
        if endpoint.api != "chat":
            raise EndpointError("conversations need messages; give --endpoint-api chat")
        messages = [{"role": each[0], "content": each[1]} for each in prompt if isinstance(each, tuple)]
        return {**fields, "messages": messages, **endpoint.extra}
    if isinstance(prompt, list) and (endpoint.api == "chat" or endpoint.prompts == "text"):
        if endpoint.tokenizer is None:
            raise EndpointError("prompts of token ids become text with --tokenizer; give that of the model")
        prompt = counter(endpoint.tokenizer).text([each for each in prompt if isinstance(each, int)])
    if endpoint.api == "chat":
        return {**fields, "messages": [{"role": "user", "content": prompt}], **endpoint.extra}
    return {**fields, "prompt": prompt, **endpoint.extra}


async def _refused(response: httpx2.Response) -> FailedError:
    status = response.status_code
    try:
        said = words(json.loads(await response.aread()))
    except ValueError:
        said = response.text.strip()[:MOST_WORDS]
    hint = f"; {_HINTS[status]}" if status in _HINTS else ""
    return FailedError(f"HTTP_{status}", f"the endpoint answered {status}: {said or 'nothing'}{hint}")
