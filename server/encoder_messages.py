"""What crosses the link of an encoder's requests, as ``server.messages`` does of others."""

from __future__ import annotations

import enum

import msgspec


class Task(enum.StrEnum):
    """The tasks of a model; decoders generate."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"
    FILL = "fill"


class Pooling(enum.StrEnum):
    """How the vectors of a text's tokens become its embedding: the mean, the first, the last, or all."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"
    NONE = "none"


class Encode(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="encode"):
    """A text for an encoder; validated before it gets here.

    Attributes:
        id: unique among those in flight, drawn by the server process.
        task: what to do with it.
        turn: its index among its request's texts: of several requests, texts are taken in turn.
        tokens: token ids, at least one, no more than the context length.
        types: token types, as many; empty where all are 0.
        pooling: of an embedding.
        normalize: whether an embedding gets length 1.
        mask_token: id of those tokens whose places are to be filled.
        top_k: how many tokens to tell for each of these places.
    """

    id: int
    task: Task
    turn: int
    tokens: list[int]
    types: list[int] = []
    pooling: Pooling = Pooling.MEAN
    normalize: bool = False
    mask_token: int = 0
    top_k: int = 0

    @property
    def ids(self) -> list[int]:
        """The ids of its outputs."""
        return [self.id]


class EncoderDecoderInfo(msgspec.Struct, array_like=True):
    """An encoder-decoder's facts beside ``Ready``.

    Attributes:
        source_length: most tokens of a source, which is a request's prompt.
        target_length: most tokens of a target: what the decoder begins with, and the output.
    """

    source_length: int
    target_length: int


class EncoderInfo(msgspec.Struct, array_like=True):
    """An encoder's facts beside ``Ready``.

    Attributes:
        embedding_size: numbers of an embedding.
        pooling: how the model's makers made one of a text's vectors.
        normalized: whether these then have length 1.
        labels: names of those that its head scores.
        token_types: how many it knows of those that a tokenizer makes; 0 where they are not passed to it.
        prompts: by name, texts with which the makers begin texts.
        default_prompt: the name of the one for requests that name none.
    """

    embedding_size: int
    pooling: Pooling
    normalized: bool
    labels: list[str] = []
    token_types: int = 0
    prompts: dict[str, str] = {}
    default_prompt: str | None = None
