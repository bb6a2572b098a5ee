"""Logs on standard error, for people or as JSON; nothing of what users write without ``--log-texts``."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Literal

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The name of the call that this task serves: the client's ``request_id``, or one drawn by the server."""

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def configure_logging(level: str, form: LogFormat = "text") -> None:
    """Sends the process's records of at least ``level`` (``debug`` to ``error``) to standard error.

    As JSON, one object per line: ``timestamp`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, what the
    record carries beside (``extra``), and ``request_id`` where a request is being served.
    Libraries log from ``warning`` on: ``--log-level debug`` shows Longspan and not its dependencies.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.addFilter(_name_request)
        handler.setFormatter(_json_formatter())
    else:
        handler.setFormatter(logging.Formatter(_TEXT, datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("longspan").setLevel(level.upper())
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a client has left before its answer was sent, of which gRPC logs a traceback for each call."""
    return not (record.exc_info and record.exc_info[0] and record.exc_info[0].__name__ == "ExecuteBatchError")


def _name_request(record: logging.LogRecord) -> bool:
    if not hasattr(record, "request_id") and (name := request_id.get()):
        record.request_id = name
    return True


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        timestamp=True,
        rename_fields={"levelname": "level", "name": "logger"},
    )
