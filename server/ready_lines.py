"""The lines that a server prints once it is ready: what it serves, where, and a command to try it with."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from longspan.channel import DEFAULT_HOST, DEFAULT_PORT
from server.api.state import Served
from server.models import annalog
from server.settings import Settings

EXAMPLE = "What is the capital of Japan?"
"""A question that the default model answers rightly, and far from any tie, under every backend."""


def ready_lines(served: Served, settings: Settings, port: int, metrics_port: int) -> str:
    """The lines.

    Args:
        served: the model.
        settings: of the server.
        port: of gRPC.
        metrics_port: of ``/metrics``.
    """
    ready = served.ready
    lines = (
        f"Longspan is ready: {served.name} on {settings.host}:{port}\n"
        f"  {ready.attention_backend} attention, {ready.attention_kernel} kernel"
    )
    if settings.metrics:
        scheme = "https" if settings.metrics_tls else "http"
        lines += f", metrics {scheme}://{settings.metrics_host}:{metrics_port}/metrics"
    if not served.tokenizer.has_text:
        return f"{lines}\n  token ids only: the model has no tokenizer"
    command = [_command(), *_example(served, settings)]
    if settings.identities is not None:  # not --token, which lists of processes show
        command.insert(0, "LONGSPAN_TOKEN=TOKEN")
    if settings.host != DEFAULT_HOST:
        command += ["--host", settings.host]
    if port != DEFAULT_PORT:
        command += ["--port", str(port)]
    # Values that only the client knows are in capitals.
    if settings.tls_certificate is not None:
        command += ["--ca", "ROOT.pem"]
    if settings.tls_client_ca is not None:
        command += ["--cert", "OWN.pem", "--key", "OWN.key"]
    hint = " ".join(f'"{word}"' if " " in word else shlex.quote(word) for word in command)
    return f"{lines}\n  try: {hint}"


def _example(served: Served, settings: Settings) -> list[str]:
    if served.ready.encoder is not None:
        return ["embed", "a cat", "a kitten", "an invoice"]
    if settings.model == annalog.NAME:
        return ["generate", annalog.EXAMPLE]
    return [
        "generate",
        *([EXAMPLE, "--chat"] if served.tokenizer.has_chat_template else ["Once upon a time"]),
    ]


def _command() -> str:
    """How to call this program from here: by name if the shell finds it, else by its path."""
    if shutil.which("longspan"):
        return "longspan"
    return os.path.relpath(Path(sys.executable).with_name("longspan"))
