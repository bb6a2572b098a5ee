"""A request to the engine, from its admission to its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from server.access.callers import caller
from server.api import errors
from server.api.account import account
from server.api.state import ServerState
from server.engine.ipc.output import EngineDeadError, OutputStream
from server.observe.logging import request_id
from server.observe.metrics import Metrics


class InFlight(ABC):
    """The request of the call that this task serves, which has an open account.

    One method runs it, once; ``abort`` and ``fail`` end it from another task.
    """

    def __init__(self, state: ServerState, metrics: Metrics) -> None:
        self._state, self._metrics = state, metrics
        self._request_id, self._caller, self._account = request_id.get(), caller.get(), account.get()
        self._stream: OutputStream | None = None
        self._error: errors.ServiceError | None = None

    @abstractmethod
    def abort(self) -> None:
        """Ends the request as its client asks by its name."""

    def fail(self, error: errors.ServiceError) -> None:
        """Ends the request with ``error``."""
        self._error = error
        self._end()

    def _end(self) -> None:
        """Has the engine forget the request."""
        if self._stream is not None:
            self._stream.abort()

    @contextmanager
    def _in_engine(self) -> Iterator[None]:
        """Ends the request in the engine, and raises what ended it here."""
        try:
            yield
        except EngineDeadError as error:
            raise errors.engine_dead(str(error)) from error
        finally:
            self._end()
        if self._error is not None:
            raise self._error
