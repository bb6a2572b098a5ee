"""The engine's output of a request to the events of its answer; the events to one message for unary calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from longspan.v1 import inference_pb2, types_pb2
from server.api.state import Served
from server.api.stops import stops_from
from server.engine.ipc.output import OutputStream
from server.messages import FinishReason, PositionLogprob, SequenceOutput
from server.observe.request import RequestRecord
from server.text.assemble import OutputAssembler, OutputDelta
from server.text.stop import StopStrings

Event = inference_pb2.StreamGenerateResponse

# Prompt positions in one message, at most, for the same reason.
_MOST_POSITIONS = 512

# Tokens with log probabilities in one message, at most.
_MOST_TOKENS = 64

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
    # Deltas of one batch of output, merged into one message.
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
        stop: its stop strings.
        ids: of its sequences in the engine, one per sample.
        prompt_tokens: tokens of its prompt.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        request_id: str,
        served: Served,
        stop: StopStrings,
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
                    stop=stop,
                    include_stop_string=request.stop.include_stop_string,
                    keep_special_tokens=request.keep_special_tokens,
                    min_tokens=stops_from(request),
                ),
            )
            for index, id_ in enumerate(ids)
        }

    def take(
        self, taken: Sequence[tuple[SequenceOutput, float]], stream: OutputStream, record: RequestRecord
    ) -> Iterator[Event]:
        """Events of output that came together: all that is new of a sample becomes one."""
        for output, when in taken:
            sample = self._samples[output.id]
            if sample.output.finish is not None:
                continue  # a stop string ended it earlier in ``taken``
            if output.finish is FinishReason.FAILED:
                raise RuntimeError(f"the engine could not compute sequence {output.id}; its log says more")
            if not self._accepted:
                yield self._accept(record, output)
            if output.prompt_logprobs is not None:
                yield from self._prompt(output.prompt_logprobs)
            first, *others = _parts(output)
            self._push(sample, first, when, stream, record)
            for part in others:
                yield from self._deltas()
                self._push(sample, part, when, stream, record)
        yield from self._deltas()

    def close(self, record: RequestRecord) -> Iterable[Event]:
        """The last events; samples that the engine has not ended were aborted."""
        if not self._accepted:
            yield self._accept(record, None)
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

    def _prompt(self, logprobs: Sequence[PositionLogprob]) -> Iterator[Event]:
        for start in range(0, len(logprobs), _MOST_POSITIONS):
            positions = [self._position(position) for position in logprobs[start : start + _MOST_POSITIONS]]
            yield Event(prompt_logprobs=inference_pb2.PromptLogprobs(positions=positions))

    def _push(
        self,
        sample: _Sample,
        output: SequenceOutput,
        when: float,
        stream: OutputStream,
        record: RequestRecord,
    ) -> None:
        before = sample.output.token_count
        delta = sample.output.push(output.tokens, output.logprobs, output.finish)
        count = sample.output.token_count - before
        record.tokens(sample.index, count, when, output.preemptions)
        record.searched(output.searched_tokens)
        record.drafted(output.draft_tokens, min(output.accepted_draft_tokens, count))
        sample.deltas.append(delta)
        if delta.finish is not None:
            sample.matched = delta.matched
        if delta.abort:
            stream.abort([output.id])

    def _accept(self, record: RequestRecord, output: SequenceOutput | None) -> Event:
        self._accepted = True
        record.begin(self._prompt_tokens, output)
        return Event(
            accepted=inference_pb2.Accepted(
                request_id=self._request_id,
                model=self._served.name,
                prompt_tokens=record.prompt_tokens,
                cached_prompt_tokens=record.cached_tokens,
            )
        )

    def _deltas(self) -> Iterator[Event]:
        """One event for each sample that has something new."""
        for sample in self._samples.values():
            if not sample.deltas:
                continue
            deltas, sample.deltas = sample.deltas, []
            event = Event()
            # Set in place, field by field: a message from keywords takes twice as long, once per token.
            merged = event.delta
            merged.index = sample.index
            merged.text = "".join([delta.text for delta in deltas])
            ended = False
            for delta in deltas:
                merged.token_ids.extend(delta.token_ids)
                if delta.logprobs:
                    merged.logprobs.extend(map(self._position, delta.logprobs))
                ended = ended or delta.finish is not None
            if ended:
                merged.result.CopyFrom(sample.result())
            elif not merged.text and not merged.token_ids:
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


def _parts(output: SequenceOutput) -> list[SequenceOutput]:
    """The output of a search, whose tokens come all at once, in parts that fit a message each."""
    tokens, logprobs = output.tokens, output.logprobs
    if logprobs is None or len(tokens) <= _MOST_TOKENS:
        return [output]
    parts = [
        SequenceOutput(
            output.id,
            tokens[at : at + _MOST_TOKENS],
            logprobs[at : at + _MOST_TOKENS],
            preemptions=output.preemptions,
        )
        for at in range(0, len(tokens), _MOST_TOKENS)
    ]
    parts[0].searched_tokens = output.searched_tokens
    parts[-1].finish = output.finish
    return parts


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
