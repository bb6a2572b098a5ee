"""Calls that fail, as the log tells them: nothing of what their clients wrote, unless that was asked for."""

from __future__ import annotations

import logging

from google.rpc import error_details_pb2

from server.api.errors import ServiceError
from server.observe.logging import request_id

log = logging.getLogger("longspan.api")


class _UntoldError(Exception):
    """Stands for an exception whose message may quote a request."""


def log_refusal(error: ServiceError, *, texts: bool) -> None:
    """A call was refused, or ended early.

    Args:
        error: its status.
        texts: the settings' ``log_texts``: whether the sentence may be logged, which can quote a field.
    """
    violations = [
        violation.field
        for detail in error.details
        if isinstance(detail, error_details_pb2.BadRequest)
        for violation in detail.field_violations
    ]
    told = error.message if texts else ", ".join([error.reason, *violations])
    log.debug("request %s: %s: %s", request_id.get(), error.code.name, told)


def log_failure(error: Exception, method: str, *, texts: bool) -> None:
    """A call met a bug.

    Args:
        error: what was raised, with its trace.
        method: that was called.
        texts: as above, for the exception's message.
    """
    shown = error if texts else _UntoldError(f"{type(error).__name__}; --log-texts shows its message")
    told = (type(shown), shown, error.__traceback__)
    log.error("request %s to %s failed", request_id.get(), method, exc_info=told)
