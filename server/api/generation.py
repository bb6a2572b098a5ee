"""One generation request, from its admission to its last event."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from longspan.v1 import inference_pb2
from server.api import conversion, errors
from server.api.answer import Answer, Event
from server.api.in_flight import InFlight
from server.api.prompt import prompt_ids
from server.api.state import ServerState
from server.encoder_messages import Task
from server.observe.metrics import Metrics
from server.observe.request import RequestRecord

# Output merged into one message, at most: with log probabilities it stays far below gRPC's usual 4 MiB.
_MOST_MERGED = 64


class Generation(InFlight):
    """A request in flight, which ``events`` runs."""

    def __init__(self, request: inference_pb2.GenerateRequest, state: ServerState, metrics: Metrics) -> None:
        super().__init__(state, metrics)
        self._request = request
        self._aborted = False

    def abort(self) -> None:
        """Ends the request as if it were complete; its samples finish with ABORTED."""
        self._aborted = True
        self._end()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Accepted, prompt log probabilities where asked for, deltas, Finished.

        The engine forgets the request as soon as this iterator is closed, for whatever reason.

        Raises:
            ServiceError: the request can't be answered, or no longer.
        """
        # One generator for the whole way: each more on it would cost every token a few microseconds.
        account = self._account
        account.model = self._request.model
        served = self._state.model(self._request.model)
        served.check_task(Task.GENERATE)
        plan = conversion.plan(self._request, served, self._state.limits)
        self._check_priority()
        quota = self._caller.quota
        with self._state.admission.admit(self._caller, self._request_id, self, plan.width):
            prompt = await prompt_ids(self._request, served, self._state)
            if self._error is not None:
                raise self._error
            length, shared = served.ready.context_length, self._state.settings.prefix_cache
            claimed = plan.kv_tokens(len(prompt), length, shared=shared or plan.beams is not None)
            self._state.admission.claim(self._caller, self._request_id, claimed)
            quota.spend(len(prompt))
            ids = served.engine.new_ids(plan.n)
            answer = Answer(self._request, self._request_id, served, plan.stop, ids, len(prompt))
            searches = plan.beams is not None
            record = RequestRecord(self._metrics, plan.n, account.arrival, quota.spend, searches=searches)
            account.record = record
            if not self._aborted:
                with self._in_engine():
                    sequences = plan.sequences(ids, prompt, length, self._caller.salt)
                    stream = self._stream = served.engine.submit(sequences)
                    account.submitted = True
                    # Outputs that came while the client was slow to take an event are taken together.
                    while taken := await stream.take(_MOST_MERGED):
                        for event in answer.take(taken, stream, record):
                            yield event
            for event in answer.close(record):
                yield event
            account.finish = answer.finish()

    def _check_priority(self) -> None:
        most = self._caller.identity.max_priority
        if most is not None and self._request.priority > most:
            raise errors.priority_denied(self._request.priority, most)
