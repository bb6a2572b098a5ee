"""One generation request, from its admission to its last event."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

import grpc

from longspan.v1 import inference_pb2, types_pb2
from server.access.callers import Caller
from server.api import conversion, errors
from server.api.answer import Answer, Event
from server.api.prompt import prompt_ids
from server.api.state import ServerState
from server.engine.ipc.link import EngineDeadError, OutputStream
from server.observe.metrics import Metrics
from server.observe.request import Moments, RequestRecord
from server.observe.tracing import Metadata, Traces

log = logging.getLogger("longspan.requests")

# Output merged into one message, at most: with log probabilities it stays far below gRPC's usual 4 MiB.
_MOST_MERGED = 64


class Generation:
    """A request in flight. ``events`` runs it, once; ``abort`` and ``fail`` end it from another task."""

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        request_id: str,
        caller: Caller,
        state: ServerState,
        metrics: Metrics,
        traces: Traces | None = None,
    ) -> None:
        self._arrival = time.monotonic()
        self._request = request
        self._request_id = request_id
        self._caller = caller
        self._state = state
        self._metrics = metrics
        self._traces = traces
        self._record: RequestRecord | None = None
        self._stream: OutputStream | None = None
        self._aborted = False
        self._error: errors.ServiceError | None = None
        self._finish = "none"

    def abort(self) -> None:
        """Ends the request as if it were complete; its samples finish with ABORTED."""
        self._aborted = True
        self._wake()

    def fail(self, error: errors.ServiceError) -> None:
        """Ends the request with ``error``."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._stream is not None:
            self._stream.abort()

    async def events(
        self, cancellation: Callable[[], grpc.StatusCode], metadata: Metadata = ()
    ) -> AsyncGenerator[Event, None]:
        """Accepted, prompt log probabilities where asked for, deltas, Finished.

        The engine forgets the request as soon as this iterator is closed, for whatever reason.

        Args:
            cancellation: tells, once the call was ended from outside, with which status.
            metadata: of the call.

        Raises:
            ServiceError: the request can't be answered, or no longer.
        """
        # One generator for the whole way: each more on it would cost every token a few microseconds.
        with self._accounted(cancellation, metadata):
            served = self._state.model(self._request.model)
            plan = conversion.plan(self._request, served, self._state.limits)
            self._check_priority()
            quota = self._caller.quota
            with self._state.admission.admit(self._caller, self._request_id, self, plan.n):
                prompt = await prompt_ids(self._request, served, self._state)
                if self._error is not None:
                    raise self._error
                quota.spend(len(prompt))
                ids = served.engine.new_ids(plan.n)
                answer = Answer(self._request, self._request_id, served, plan.stop, ids, len(prompt))
                record = self._record = RequestRecord(self._metrics, plan.n, self._arrival, quota.spend)
                if not self._aborted:
                    with self._engine_errors():
                        length, salt = served.ready.context_length, self._caller.salt
                        sequences = plan.sequences(ids, prompt, length, salt)
                        stream = self._stream = served.engine.submit(sequences)
                        # Outputs that came while the client was slow to take an event are taken together.
                        while taken := await stream.take(_MOST_MERGED):
                            for event in answer.take(taken, stream, record):
                                yield event
                for event in answer.close(record):
                    yield event
                self._finish = answer.finish()

    def _check_priority(self) -> None:
        most = self._caller.identity.max_priority
        if most is not None and self._request.priority > most:
            raise errors.priority_denied(self._request.priority, most)

    @contextmanager
    def _accounted(self, cancellation: Callable[[], grpc.StatusCode], metadata: Metadata) -> Iterator[None]:
        """Counts, logs and traces how the request ended."""
        code = grpc.StatusCode.INTERNAL
        try:
            yield
            code = grpc.StatusCode.OK
        except errors.ServiceError as error:
            code = error.code
            if self._stream is None:
                self._metrics.rejections.labels(*self._metrics.labels(error.reason.lower())).inc()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = cancellation()
            raise
        finally:
            self._metrics.requests.labels(*self._metrics.labels(self._finish, code.name)).inc()
            self._tell(code, metadata)

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        """Ends the request in the engine, and raises what ended it here."""
        try:
            yield
        except EngineDeadError as error:
            raise errors.engine_dead(str(error)) from error
        finally:
            if self._stream is not None:
                self._stream.abort()
        if self._error is not None:
            raise self._error

    def _tell(self, code: grpc.StatusCode, metadata: Metadata) -> None:
        """The log's line about a request that has ended, and its trace."""
        record = self._record
        usage = record.usage() if record is not None else types_pb2.Usage()
        moments = record.moments() if record is not None else self._nothing()
        seconds = moments.end - moments.arrival
        who = self._caller.identity.name
        log.info(
            "request %s: %s, %s; %d prompt tokens, %d generated, %.3f s",
            *(f"{self._request_id} of {who}" if who else self._request_id, code.name, self._finish),
            *(usage.prompt_tokens, usage.completion_tokens, seconds),
            extra={
                "request_id": self._request_id,
                "grpc_code": code.name,
                "finish_reason": self._finish,
                "prompt_tokens": usage.prompt_tokens,
                "cached_prompt_tokens": usage.cached_prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "seconds": round(seconds, 6),
                **({"identity": who} if who else {}),
            },
        )
        if self._traces is not None:
            served = self._state.served
            attributes: dict[str, str | int | float | list[str]] = {
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": self._request.model or (served.name if served else ""),
                "gen_ai.response.id": self._request_id,
                "gen_ai.response.finish_reasons": [self._finish],
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "longspan.usage.cached_input_tokens": usage.cached_prompt_tokens,
            }
            self._traces.request(metadata, moments, code, attributes)

    def _nothing(self) -> Moments:
        """The moments of a request that came to nothing before the engine had it."""
        return Moments(self._arrival, None, None, None, time.monotonic())
