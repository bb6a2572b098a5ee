"""How requests to the engine end: each is counted, logged and traced once, whatever ends it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar

import grpc

from longspan.v1 import types_pb2
from server.access.callers import caller
from server.api.errors import ServiceError
from server.api.state import ServerState
from server.observe.logging import request_id
from server.observe.metrics import Metrics
from server.observe.request import Moments, RequestRecord
from server.observe.tracing import Metadata, Traces

log = logging.getLogger("longspan.requests")


class Account:
    """One request's, opened when its call begins. The interceptor closes it; the request fills it in.

    Attributes:
        arrival: monotonic time.
        model: as the request names it.
        record: its times and token counts, once it was admitted.
        submitted: whether the engine has got it.
        finish: how its samples ended, in one word, once they have.
        operation: what it asks for, as OpenTelemetry calls that.
    """

    def __init__(self, accounts: Accounts, metadata: Callable[[], Metadata]) -> None:
        self._accounts = accounts
        self._metadata = metadata
        self.arrival = time.monotonic()
        self.model = ""
        self.record: RequestRecord | None = None
        self.submitted = False
        self.finish = "none"
        self.operation = "text_completion"

    def close(self, code: grpc.StatusCode, error: ServiceError | None = None) -> None:
        """The call ends with this status, and with this error if it was refused or failed."""
        metrics = self._accounts.metrics
        if error is not None and not self.submitted:
            metrics.rejections.labels(*metrics.labels(error.reason.lower())).inc()
        metrics.requests.labels(*metrics.labels(self.finish, code.name)).inc()
        record = self.record
        usage = record.usage() if record is not None else types_pb2.Usage()
        moments = record.moments() if record is not None else self._nothing()
        self._log(code, usage, moments.end - moments.arrival)
        if self._accounts.traces is not None:
            self._trace(self._accounts.traces, code, usage, moments)

    def _log(self, code: grpc.StatusCode, usage: types_pb2.Usage, seconds: float) -> None:
        known = caller.get(None)
        who = known.identity.name if known is not None else ""
        # Strangers must not be able to fill the log.
        log.log(
            logging.DEBUG if code is grpc.StatusCode.UNAUTHENTICATED else logging.INFO,
            "request %s: %s, %s; %d prompt tokens, %d generated, %.3f s",
            *(f"{request_id.get()} of {who}" if who else request_id.get(), code.name, self.finish),
            *(usage.prompt_tokens, usage.completion_tokens, seconds),
            extra={
                "request_id": request_id.get(),
                "grpc_code": code.name,
                "finish_reason": self.finish,
                "prompt_tokens": usage.prompt_tokens,
                "cached_prompt_tokens": usage.cached_prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "seconds": round(seconds, 6),
                **({"identity": who} if who else {}),
            },
        )

    def _trace(self, traces: Traces, code: grpc.StatusCode, usage: types_pb2.Usage, moments: Moments) -> None:
        served = self._accounts.state.served
        attributes: dict[str, str | int | float | list[str]] = {
            "gen_ai.operation.name": self.operation,
            "gen_ai.request.model": self.model or (served.name if served else ""),
            "gen_ai.response.id": request_id.get(),
            "gen_ai.response.finish_reasons": [self.finish],
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "longspan.usage.cached_input_tokens": usage.cached_prompt_tokens,
        }
        traces.request(self._metadata(), moments, code, attributes)

    def _nothing(self) -> Moments:
        """The moments of a request that came to nothing before the engine had it."""
        return Moments(self.arrival, None, None, None, time.monotonic())


class Accounts:
    """Opens the account of each request.

    Attributes:
        state: of the server.
        metrics: in which requests are counted.
        traces: to which they are sent, if anywhere.
    """

    def __init__(self, state: ServerState, metrics: Metrics, traces: Traces | None) -> None:
        self.state = state
        self.metrics = metrics
        self.traces = traces

    def open(self, metadata: Callable[[], Metadata]) -> Account:
        """The account of a request whose call begins now, which this task finds as ``account``.

        Args:
            metadata: tells that of the call.
        """
        opened = Account(self, metadata)
        account.set(opened)
        return opened


account: ContextVar[Account] = ContextVar("account")
"""That of the request that this task serves."""
