"""One streamed answer of an OpenAI-compatible server, message by message."""

from __future__ import annotations

import json
from typing import Any

MOST_WORDS = 300
"""Letters of a server's error that are kept."""


class FailedError(Exception):
    """A request failed.

    Args:
        code: what happened, in capitals.
        sentence: how.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Answer:
    """The content of one stream so far.

    Attributes:
        parts: texts, one per message that had any.
        usage: the server's own counts; empty before they came.
        finish_reason: as the server says; empty before it came.
        ended: when the stream said that it is done, in seconds of the monotonic clock; 0 before.
    """

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.usage: dict[str, Any] = {}
        self.finish_reason = ""
        self.ended = 0.0

    def take(self, data: str) -> str:
        """The text of an event's data.

        Raises:
            FailedError: it is no message, or tells an error.
        """
        try:
            message = json.loads(data)
        except ValueError as error:
            raise FailedError("MALFORMED", f"a message is not JSON ({error}): {data[:80]!r}") from error
        if not isinstance(message, dict):
            raise FailedError("MALFORMED", f"a message is not a JSON object: {data[:80]!r}")
        if message.get("error"):
            raise FailedError("STREAM_ERROR", f"the endpoint says midway: {words(message)}")
        if isinstance(message.get("usage"), dict):
            self.usage = message["usage"]
        choices = message.get("choices")
        if choices is None and self.usage and message.get("usage"):
            return ""
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise FailedError("MALFORMED", f"a message has no choices: {data[:80]!r}")
        texts = []
        for choice in choices:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            delta = choice.get("delta")
            delta = delta if isinstance(delta, dict) else {}
            said = (
                choice.get("text"),
                delta.get("reasoning_content") or delta.get("reasoning"),
                delta.get("content"),
            )
            texts += [text for text in said if isinstance(text, str)]
        return "".join(texts)

    def told(self, name: str) -> int | None:
        """A count of the usage."""
        count = self.usage.get(name)
        return count if isinstance(count, int) and count >= 0 else None

    @property
    def cached(self) -> int:
        """Prompt tokens from the endpoint's prefix cache, as it says."""
        details = self.usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return cached if isinstance(cached, int) else 0


def words(message: Any) -> str:
    """The sentence of an error object."""
    error = message.get("error", message) if isinstance(message, dict) else message
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return str(error)[:MOST_WORDS]
