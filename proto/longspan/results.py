"""Results of a client, where a class is handier than the message."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longspan.v1 import inference_pb2, types_pb2


class FinishReason(enum.StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


_REASONS = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    types_pb2.FINISH_REASON_ABORTED: FinishReason.ABORTED,
}


def finish_reason(result: types_pb2.SampleResult) -> FinishReason | None:
    """Why a sample ended; ``None`` where it has not."""
    return _REASONS.get(result.finish_reason)


def matched_stop(result: types_pb2.SampleResult) -> int | str | None:
    """The token id or the string that ended a sample; ``None`` where neither did."""
    match result.matched_stop.WhichOneof("match"):
        case "token_id":
            return result.matched_stop.token_id
        case "text":
            return result.matched_stop.text
        case _:
            return None


@dataclass(frozen=True, slots=True)
class Completion:
    """One complete sample.

    Attributes:
        index: which of the ``n`` samples.
        text: its text.
        token_ids: its tokens, stop token included.
        logprobs: one entry per token, where asked for.
        finish_reason: why it ended.
        matched_stop: the token id or string that ended it, if one did.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[types_pb2.PositionLogprobs]
    finish_reason: FinishReason | None
    matched_stop: int | str | None


@dataclass(frozen=True, slots=True)
class Generation:
    """The complete answer to a request.

    Attributes:
        request_id: its name, given or drawn by the server.
        model: the model that answered.
        completions: the samples, by index.
        prompt_logprobs: one entry per prompt token but the first, where asked for.
        usage: tokens consumed.
        timings: where the time went, in seconds of the server's clock.
    """

    request_id: str
    model: str
    completions: Sequence[Completion]
    prompt_logprobs: Sequence[types_pb2.PositionLogprobs]
    usage: types_pb2.Usage
    timings: types_pb2.Timings

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.completions[0].text

    @property
    def token_ids(self) -> Sequence[int]:
        """Tokens of the first sample."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first sample ended."""
        return self.completions[0].finish_reason

    @classmethod
    def from_message(cls, response: inference_pb2.GenerateResponse) -> Generation:
        """The answer as the server sent it."""
        return cls(
            request_id=response.request_id,
            model=response.model,
            completions=[
                Completion(
                    index=completion.result.index,
                    text=completion.text,
                    token_ids=list(completion.token_ids),
                    logprobs=list(completion.logprobs),
                    finish_reason=finish_reason(completion.result),
                    matched_stop=matched_stop(completion.result),
                )
                for completion in response.completions
            ],
            prompt_logprobs=list(response.prompt_logprobs),
            usage=response.usage,
            timings=response.timings,
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of one sample.

    Attributes:
        index: which of the ``n`` samples.
        text: new text; may be empty.
        token_ids: new tokens, no earlier than their text.
        logprobs: one entry per token, where asked for.
        finish_reason: set on the sample's last delta.
        matched_stop: the token id or string that ended the sample, if one did.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[types_pb2.PositionLogprobs]
    finish_reason: FinishReason | None
    matched_stop: int | str | None

    @classmethod
    def from_message(cls, delta: inference_pb2.Delta) -> Delta:
        """The event as the server sent it."""
        ended = delta.HasField("result")
        return cls(
            delta.index,
            delta.text,
            list(delta.token_ids),
            list(delta.logprobs),
            finish_reason(delta.result) if ended else None,
            matched_stop(delta.result) if ended else None,
        )


class StreamState:
    """The state of a stream beside its deltas; shared by the synchronous and the asyncio stream.

    Attributes:
        request_id: the request's name; empty until the server has accepted it.
        model: the model that answers; empty until then.
        prompt_tokens: tokens of the prompt; 0 until then.
        cached_prompt_tokens: those of them found in the prefix cache; 0 until then.
        prompt_logprobs: one entry per prompt token but the first, where asked for.
        results: how each sample ended, by index; empty until the end.
        usage: tokens consumed; ``None`` until the end.
        timings: where the time went, in seconds of the server's clock; ``None`` until the end.
    """

    def __init__(self, call: Any, server: str) -> None:
        self._call, self._server = call, server
        self.request_id = ""
        self.model = ""
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.prompt_logprobs: list[types_pb2.PositionLogprobs] = []
        self.results: Sequence[types_pb2.SampleResult] = []
        self.usage: types_pb2.Usage | None = None
        self.timings: types_pb2.Timings | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first sample ended; ``None`` until the stream's end."""
        return finish_reason(self.results[0]) if self.results else None

    def _take(self, response: inference_pb2.StreamGenerateResponse) -> Delta | None:
        """Notes an event; gives the delta if it is one."""
        match response.WhichOneof("event"):
            case "delta":
                return Delta.from_message(response.delta)
            case "accepted":
                self.request_id = response.accepted.request_id
                self.model = response.accepted.model
                self.prompt_tokens = response.accepted.prompt_tokens
                self.cached_prompt_tokens = response.accepted.cached_prompt_tokens
            case "prompt_logprobs":
                self.prompt_logprobs.extend(response.prompt_logprobs.positions)
            case "finished":
                self.results = list(response.finished.results)
                self.usage = response.finished.usage
                self.timings = response.finished.timings
        return None
