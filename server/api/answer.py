"""The engine's news of a request to the events of its answer; the events to one message for unary calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from longspan.v1 import inference_pb2, types_pb2
from server.api.state import Served
from server.engine.link import NewsStream
from server.engine.types import FinishReason, PositionLogprob, SequenceNews
from server.observe.request import RequestRecord
from server.text.assemble import OutputAssembler, OutputDelta

Event = inference_pb2.StreamGenerateResponse

# News merged into one message, at most: with log probabilities it stays far below gRPC's usual 4 MiB.
_MOST_MERGED = 64

# Prompt positions in one message, at most, for the same reason.
_MOST_POSITIONS = 512

_FINISH_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: types_pb2.FINISH_REASON_ABORTED,
}


@dataclass(slots=True)
class _Sample:
    index: int
    id: int
    output: OutputAssembler
    matched: str | int | None = None
    # Deltas of one batch of news, merged into one message.
    deltas: list[OutputDelta] = field(default_factory=list)

    def result(self) -> types_pb2.SampleResult:
        """How the sample ended."""
        result = types_pb2.SampleResult(
            index=self.index,
            finish_reason=_FINISH_REASONS[self.output.finish or FinishReason.ABORTED],
            token_count=self.output.token_count,
        )
        if isinstance(self.matched, int):
            result.matched_stop.token_id = self.matched
        elif self.matched is not None:
            result.matched_stop.text = self.matched
        return result


class Answer:
    """The response side of one request.

    Args:
        request: as it came.
        request_id: its name.
        served: the model that answers.
        ids: of its sequences in the engine, one per sample.
        prompt_tokens: tokens of its prompt.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        request_id: str,
        served: Served,
        ids: Sequence[int],
        prompt_tokens: int,
    ) -> None:
        self._request_id = request_id
        self._served = served
        self._prompt_tokens = prompt_tokens
        self._accepted = False
        self._samples = {
            id_: _Sample(
                index,
                id_,
                OutputAssembler(
                    served.tokenizer,
                    stop_strings=list(request.stop.stop_strings),
                    include_stop_string=request.stop.include_stop_string,
                    keep_special_tokens=request.keep_special_tokens,
                    min_tokens=request.stop.min_tokens,
                ),
            )
            for index, id_ in enumerate(ids)
        }

    async def follow(self, stream: NewsStream, record: RequestRecord) -> AsyncGenerator[Event, None]:
        """Events until the engine has ended all samples, but the last.

        News that came while the client was slow to take the previous event becomes one event per sample.
        """
        async for news, when in stream:
            for event in self._take(news, when, stream, record):
                yield event
            for _ in range(_MOST_MERGED):
                item = await anext(stream, None) if stream.pending else None
                if item is None:
                    break
                for event in self._take(*item, stream, record):
                    yield event
            for event in self._deltas():
                yield event

    def close(self, record: RequestRecord) -> Iterable[Event]:
        """The last events; samples that the engine has not ended were aborted."""
        yield from self._accept(record, None)
        for sample in self._samples.values():
            if sample.output.finish is None:
                sample.deltas.append(sample.output.push([], finish=FinishReason.ABORTED))
        yield from self._deltas()
        results = [sample.result() for sample in self._samples.values()]
        yield Event(
            finished=inference_pb2.Finished(results=results, usage=record.usage(), timings=record.complete())
        )

    def finish(self) -> str:
        """How the request ended, in one word: what weighs most among its samples."""
        reasons = {sample.output.finish for sample in self._samples.values()}
        ranked = (FinishReason.ABORTED, FinishReason.LENGTH, FinishReason.STOP)
        return next(reason.value for reason in ranked if reason in reasons)

    def _take(
        self, news: SequenceNews, when: float, stream: NewsStream, record: RequestRecord
    ) -> Iterable[Event]:
        if news.finish is FinishReason.FAILED:
            raise RuntimeError(f"the engine could not compute sequence {news.id}; its log says more")
        sample = self._samples[news.id]
        yield from self._accept(record, news)
        if news.prompt_logprobs is not None:
            for start in range(0, len(news.prompt_logprobs), _MOST_POSITIONS):
                part = news.prompt_logprobs[start : start + _MOST_POSITIONS]
                positions = [self._position(position) for position in part]
                yield Event(prompt_logprobs=inference_pb2.PromptLogprobs(positions=positions))
        before = sample.output.token_count
        delta = sample.output.push(news.tokens, news.logprobs, news.finish)
        record.tokens(sample.index, sample.output.token_count - before, when, news.preemptions)
        sample.deltas.append(delta)
        if delta.finish is not None:
            sample.matched = delta.matched
        if delta.abort:
            stream.abort([news.id])

    def _accept(self, record: RequestRecord, news: SequenceNews | None) -> Iterable[Event]:
        if self._accepted:
            return
        self._accepted = True
        record.begin(self._prompt_tokens, news)
        yield Event(
            accepted=inference_pb2.Accepted(
                request_id=self._request_id,
                model=self._served.name,
                prompt_tokens=record.prompt_tokens,
                cached_prompt_tokens=record.cached_tokens,
            )
        )

    def _deltas(self) -> Iterable[Event]:
        """One event for each sample that has something new."""
        for sample in self._samples.values():
            if not sample.deltas:
                continue
            deltas, sample.deltas = sample.deltas, []
            event = Event(
                delta=inference_pb2.Delta(
                    index=sample.index,
                    text="".join(delta.text for delta in deltas),
                    token_ids=[token for delta in deltas for token in delta.token_ids],
                    logprobs=[self._position(entry) for delta in deltas for entry in delta.logprobs],
                )
            )
            if any(delta.finish is not None for delta in deltas):
                event.delta.result.CopyFrom(sample.result())
            elif not event.delta.text and not event.delta.token_ids:
                continue
            yield event

    def _position(self, position: PositionLogprob) -> types_pb2.PositionLogprobs:
        chosen, *top = (
            types_pb2.TokenLogprob(
                token_id=entry.token,
                text=self._served.tokenizer.token_text(entry.token),
                logprob=entry.logprob,
                rank=entry.rank,
            )
            for entry in (position.chosen, *position.top)
        )
        return types_pb2.PositionLogprobs(chosen=chosen, top=top)


async def collect(events: AsyncIterator[Event]) -> inference_pb2.GenerateResponse:
    """A stream's events as one answer."""
    response = inference_pb2.GenerateResponse()
    texts: dict[int, list[str]] = {}
    completions: dict[int, inference_pb2.Completion] = {}
    async for event in events:
        match event.WhichOneof("event"):
            case "accepted":
                response.request_id, response.model = event.accepted.request_id, event.accepted.model
            case "prompt_logprobs":
                response.prompt_logprobs.extend(event.prompt_logprobs.positions)
            case "delta":
                delta = event.delta
                completion = completions.setdefault(delta.index, inference_pb2.Completion())
                texts.setdefault(delta.index, []).append(delta.text)
                completion.token_ids.extend(delta.token_ids)
                completion.logprobs.extend(delta.logprobs)
            case "finished":
                response.usage.CopyFrom(event.finished.usage)
                response.timings.CopyFrom(event.finished.timings)
                for result in event.finished.results:
                    completions[result.index].result.CopyFrom(result)
    for index, completion in sorted(completions.items()):
        completion.text = "".join(texts[index])
        response.completions.append(completion)
    return response
