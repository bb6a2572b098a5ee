"""From Longspan's events to the messages of ``VllmEngine``'s Generate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from smg_grpc_proto import vllm_engine_pb2 as pb

from longspan.v1 import inference_pb2, types_pb2
from server.api.answer import Event
from server.protocols.reasons import REASONS


@dataclass(slots=True)
class _Sample:
    """What one sample has so far, and what each message of it repeats."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)
    begun: bool = False


class VllmAnswer:
    """The answer to one request.

    Args:
        request: as it came.
        prompt: its token ids, as far as they are known.
    """

    def __init__(self, request: pb.GenerateRequest, prompt: Sequence[int]) -> None:
        self._streams = request.stream
        self._stop_token_ids = frozenset(request.sampling_params.stop_token_ids)
        self._prompt = prompt
        # Made as they come: how many the request asks for is checked only where its events begin.
        self._samples: defaultdict[int, _Sample] = defaultdict(_Sample)
        self._accepted = inference_pb2.Accepted()
        self._prompt_logprobs: list[types_pb2.PositionLogprobs] = []

    async def messages(self, events: AsyncIterator[Event]) -> AsyncIterator[pb.GenerateResponse]:
        """A chunk for each delta, if the request streams, and at the end a completion for each sample."""
        async for event in events:
            match event.WhichOneof("event"):
                case "accepted":
                    self._accepted = event.accepted
                case "prompt_logprobs":
                    self._prompt_logprobs.extend(event.prompt_logprobs.positions)
                case "delta":
                    chunk = self._take(event.delta)
                    if self._streams and event.delta.token_ids:
                        yield pb.GenerateResponse(chunk=chunk)
                case "finished":
                    for result in event.finished.results:
                        yield pb.GenerateResponse(complete=self._complete(result, event.finished.usage))

    def _take(self, delta: inference_pb2.Delta) -> pb.GenerateStreamChunk:
        sample = self._samples[delta.index]
        sample.tokens.extend(delta.token_ids)
        sample.logprobs.extend(delta.logprobs)
        first, sample.begun = not sample.begun, True
        return pb.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=self._accepted.prompt_tokens,
            completion_tokens=len(sample.tokens),
            cached_tokens=self._accepted.cached_prompt_tokens,
            output_logprobs=_output_logprobs(delta.logprobs),
            input_logprobs=self._input_logprobs() if first else None,
            index=delta.index,
        )

    def _complete(self, result: types_pb2.SampleResult, usage: types_pb2.Usage) -> pb.GenerateComplete:
        sample = self._samples[result.index]
        # Of all samples together, so that their sum is right.
        first = result.index == 0
        complete = pb.GenerateComplete(
            output_ids=sample.tokens,
            finish_reason=REASONS[result.finish_reason],
            prompt_tokens=self._accepted.prompt_tokens,
            completion_tokens=len(sample.tokens),
            cached_tokens=self._accepted.cached_prompt_tokens,
            # Where the request streams, chunks had them.
            output_logprobs=None if self._streams else _output_logprobs(sample.logprobs),
            input_logprobs=None if self._streams else self._input_logprobs(),
            index=result.index,
            spec_accepted_tokens=usage.accepted_draft_tokens if first else 0,
            spec_draft_tokens=usage.draft_tokens if first else 0,
        )
        stop = result.matched_stop
        if stop.WhichOneof("match") == "text":
            complete.matched_stop_str = stop.text
        elif stop.WhichOneof("match") == "token_id" and stop.token_id in self._stop_token_ids:
            complete.matched_token_id = stop.token_id
        return complete

    def _input_logprobs(self) -> pb.InputLogProbs | None:
        """Those of the prompt, whose first token has none."""
        if not self._prompt_logprobs:
            return None
        chosen = [position.chosen for position in self._prompt_logprobs]
        return pb.InputLogProbs(
            token_logprobs=[
                pb.InputTokenLogProb(),
                *(pb.InputTokenLogProb(value=token.logprob) for token in chosen),
            ],
            token_ids=[self._prompt[0], *(token.token_id for token in chosen)],
            top_logprobs=[pb.TopLogProbs(), *map(_top, self._prompt_logprobs)],
        )


def _output_logprobs(positions: Iterable[types_pb2.PositionLogprobs]) -> pb.OutputLogProbs | None:
    positions = list(positions)
    if not positions:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[position.chosen.logprob for position in positions],
        token_ids=[position.chosen.token_id for position in positions],
        top_logprobs=map(_top, positions),
    )


def _top(position: types_pb2.PositionLogprobs) -> pb.TopLogProbs:
    return pb.TopLogProbs(
        values=[token.logprob for token in position.top], token_ids=[token.token_id for token in position.top]
    )
