"""Targets of a load."""

from __future__ import annotations

import socket
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from loadtest.load.types import LoadTestError
from longspan import ConnectOptions

LONGSPAN = "longspan"
"""The name of a server of Longspan in tables."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server of Longspan, through gRPC.

    Attributes:
        host: name or address.
        port: of its gRPC service.
        connect: how to reach it.
    """

    host: str
    port: int
    connect: ConnectOptions = field(default_factory=ConnectOptions, hash=False)

    name: ClassVar[str] = LONGSPAN

    @property
    def local(self) -> bool:
        """It shares this machine's processors."""
        return is_local(self.host)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server with OpenAI's HTTP interface.

    Attributes:
        url: up to and with its version, like ``http://127.0.0.1:8000/v1``, without a slash at its end.
        model: what requests name.
        name: what tables call it.
        api: ``completions`` takes prompts as they are, ``chat`` messages through the model's template.
        prompts: how a prompt of token ids goes out: as ``ids``, or as ``text`` by the tokenizer.
        tokenizer: a ``tokenizer.json``, its folder, or a name on the Hugging Face Hub: output tokens are
            counted with it. ``None`` takes the endpoint's word (``usage``).
        extra: more fields of every request, which win over those that are there.
        key: sent as bearer token; empty for none. It is in no document.
    """

    url: str
    model: str
    name: str = "endpoint"
    api: Literal["completions", "chat"] = "completions"
    prompts: Literal["ids", "text"] = "ids"
    tokenizer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: {"ignore_eos": True}, hash=False)
    key: str = field(default="", repr=False)

    @property
    def port(self) -> int:
        """Where it listens."""
        parts = urllib.parse.urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def local(self) -> bool:
        """It shares this machine's processors."""
        return is_local(urllib.parse.urlsplit(self.url).hostname or "")

    def described(self) -> dict[str, Any]:
        """For the document."""
        return {
            "endpoint": self.url,
            "model": self.model,
            "api": self.api,
            "prompts": self.prompts if self.api == "completions" else "messages",
            "tokens": f"counted by {self.tokenizer}" if self.tokenizer else "by the endpoint's own count",
            "extra": dict(self.extra),
        }


Target = Server | Endpoint


class EndpointError(LoadTestError):
    """An endpoint can't be measured as it is asked to; the message says why, and what to change."""


def is_local(host: str) -> bool:
    """It is an address of this machine: only there can a socket be bound to it."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return True
    return False
