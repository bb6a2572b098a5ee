"""The options of reading a document, and its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Method = Literal["map-reduce", "hierarchical", "extractive"]
METHODS: tuple[Method, ...] = get_args(Method)

Listener = Callable[[str, int, int], None]
"""Called with a stage's name, how many of its requests are done, and how many it has."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A run of a document's bytes, and where it stands.

    Attributes:
        start: its first byte in the document.
        end: the byte after its last.
        first_line: the line of its first byte, from 1.
        last_line: the line of its last byte.
        text: these bytes, as UTF-8.
    """

    start: int
    end: int
    first_line: int
    last_line: int
    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """The model's text about some of the document.

    Attributes:
        text: its words.
        ids: its tokens, without an end of sequence.
        logprob: mean log probability of these, in nats.
        complete: whether it ended by itself, not at the limit of its tokens.
        sources: indexes of the passages that it was written from, ascending.
    """

    text: str
    ids: Sequence[int]
    logprob: float
    complete: bool
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that makes the answer more likely.

    Attributes:
        passage: where it stands, and its text.
        gain: mean log probability of the answer's tokens given the passage and the question, less that given
            the question alone, in nats per token; above 0.
    """

    passage: Passage
    gain: float


@dataclass(slots=True)
class Spent:
    """The cost of reading, over all requests.

    Attributes:
        requests: that generated or scored.
        prompt_tokens: of them.
        cached_prompt_tokens: those of them that the server found in its prefix cache.
        completion_tokens: generated, or scored token by token.
        waits: how often a request was sent again, because the server was too busy for it or away.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    waits: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """The answer to a question about a document, or its summary.

    Attributes:
        text: of the answer; empty if no passage tells one.
        complete: whether it ended by itself, not at ``max_tokens``.
        citations: best first; empty if no passage makes the answer more likely.
        passages: how many the document was cut into.
        passage_tokens: the most that one of them has.
        used: how many of them the answer was written from.
        method: how it was read.
        model: that read it.
        spent: what it cost.
    """

    text: str
    complete: bool
    citations: Sequence[Citation]
    passages: int
    passage_tokens: int
    used: int
    method: Method
    model: str
    spent: Spent


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a document is read.

    Attributes:
        method: see ``longspan.reading``.
        model: its name; the server's only model if left empty.
        passage_tokens: the most tokens of a passage; what the context has room for if that is less.
        overlap: the most tokens of a passage's end that the next one begins with, in whole sentences or
            lines; half of a passage if that is less.
        top: the most passages that an extractive answer is written from.
        max_tokens: the most tokens of the answer.
        citations: the most passages that are cited.
        concurrency: the most requests in flight.
        listener: told of progress.
    """

    method: Method = "map-reduce"
    model: str = ""
    passage_tokens: int = 512
    overlap: int = 64
    top: int = 4
    max_tokens: int = 256
    citations: int = 3
    concurrency: int = 8
    listener: Listener = field(default=lambda stage, done, total: None)

    def __post_init__(self) -> None:
        """Checks what needs no server.

        Raises:
            ValueError: a number is out of its range, or there is no such method.
        """
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose from {', '.join(METHODS)}")
        least = {
            "passage_tokens": 32,
            "overlap": 0,
            "top": 1,
            "max_tokens": 1,
            "citations": 0,
            "concurrency": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {bound}")
