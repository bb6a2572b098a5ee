"""A header by which a balancer sends prompts that begin alike to the replica that has their pages."""

from __future__ import annotations

import hashlib
import uuid
from typing import Literal

from longspan.v1 import inference_pb2

HEADER = "x-longspan-affinity"
"""Metadata of ``Generate`` and ``StreamGenerate`` that a balancer hashes; servers ignore it."""

By = Literal["prompt", "session"]
"""What calls that belong together share: the beginning of their prompts, or the client that sends them."""

# Shorter than most system prompts, so that conversations under one of them meet at the same replica.
_BYTES = 256
_TOKENS = 64


class Affinity:
    """Makes the header's value.

    By prompt it is a hash of the prompt's beginning: whoever reads headers, as in a balancer's log, can tell
    whether two prompts begin alike, and test a guess. By session it is random, one for all calls of a client.

    Raises:
        ValueError: there is no such kind.
    """

    def __init__(self, by: str | None) -> None:
        if by not in (None, "prompt", "session"):
            raise ValueError(f"affinity is 'prompt' or 'session', not {by!r}")
        self._by = by
        self._session = uuid.uuid4().hex[:16] if by == "session" else ""

    def of(self, request: inference_pb2.GenerateRequest) -> tuple[tuple[str, str], ...]:
        """The metadata of a call: one pair, or none where affinity is off."""
        if self._by is None:
            return ()
        return ((HEADER, self._session or _digest(request)),)


def _digest(request: inference_pb2.GenerateRequest) -> str:
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        start = " ".join(map(str, request.token_ids.ids[:_TOKENS])).encode()
    elif kind == "chat":
        start = b""
        for message in request.chat.messages:
            start += f"{message.role}\0{message.content[:_BYTES]}\0".encode()
            if message.role == "user":
                break  # what follows grows from turn to turn, and the conversation should stay where it is
    else:
        start = request.text[:_BYTES].encode()
    return hashlib.blake2b(f"{request.model}\0{kind}\0".encode() + start[:_BYTES], digest_size=8).hexdigest()
