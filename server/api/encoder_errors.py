"""Refusals of calls to encoders, and of calls that the served model can't answer."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from server.api.errors import ServiceError, bad_field, refusal
from server.encoder_messages import Task

_METHODS = {
    Task.GENERATE: "Generate and StreamGenerate",
    Task.EMBED: "Embed",
    Task.SCORE: "Score",
    Task.FILL: "FillMask",
}

_OTHERS = {
    Task.GENERATE: "a model that generates text",
    Task.EMBED: "an encoder, like minilm",
    Task.SCORE: "an encoder with a head for labels",
    Task.FILL: "an encoder with a head for masked tokens, whose tokenizer has a mask token",
}


def task_not_served(model: str, architecture: str, asked: Task, tasks: Sequence[Task]) -> ServiceError:
    """The served model can do something else."""
    can = " and ".join(_METHODS[task] for task in tasks)
    sentence = (
        f"the model {model!r} is a {architecture}, which answers {can}; for {_METHODS[asked]} ask a server "
        f"of {_OTHERS[asked]}"
    )
    code = grpc.StatusCode.FAILED_PRECONDITION
    return refusal(code, "TASK_NOT_SERVED", sentence, asked=asked, tasks=",".join(tasks))


def text_too_long(field: str, actual: int, limit: int, otherwise: str = "") -> ServiceError:
    """A text has more tokens than the model takes, and may not be cut; ``otherwise`` is another remedy."""
    sentence = (
        f"has {actual} tokens, special ones included; this model takes {limit} at most, so send it in parts"
        f"{otherwise}"
    )
    return refusal(
        *(grpc.StatusCode.INVALID_ARGUMENT, "TEXT_TOO_LONG", f"{field}: {sentence}"),
        bad_field(field, sentence),
        limit=limit,
        actual=actual,
    )


def aborted() -> ServiceError:
    """Another call ended the request by its name."""
    sentence = "the request was ended by Abort before it was answered"
    return refusal(grpc.StatusCode.ABORTED, "ABORTED", sentence)
